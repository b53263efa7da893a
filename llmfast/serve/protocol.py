"""The JSON of OpenAI's API, in and out: https://platform.openai.com/docs/api-reference

Fields that llmfast does not have are refused where they would change the answer, never ignored in silence.
Beside the API's own fields `top_k`, `min_p` and `repetition_penalty` are taken, as other servers do.
"""

import base64
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.errors import InputError
from llmfast.infer.generate import Generation
from llmfast.infer.requests import check_number
from llmfast.infer.sampling import SAMPLING_OPTIONS, broken_rule
from llmfast.report import printable

_MOST_STOPS = 4
_MOST_TEXTS = 2048
_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
# Values that mean the same as leaving the field out.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),  # 0, of /v1/completions, asks for those of the tokens chosen
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
_TEXT_FIELDS = {"model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", *SAMPLING_OPTIONS}
_EMBEDDING_FIELDS = {"model", "input", "encoding_format", "dimensions"}
# They change no answer: who asks, what for, how it is billed.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong.
        param: the field, where there is one.
        kind: the API's `type`.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        # A client may spell what UTF-8 can't: half of a surrogate pair.
        self.message, self.param = printable(message), None if param is None else printable(param)
        self.status, self.kind = status, kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the API's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": None}}


@dataclass(frozen=True)
class Ask:
    """A request for text.

    Attributes:
        fields: as `RequestReader` takes them.
        is_chat: answer with a message.
        stream: piece by piece.
        with_usage: end a stream with the counts.
    """

    fields: Mapping[str, Any]
    is_chat: bool
    stream: bool
    with_usage: bool


def read_ask(body: Mapping[str, Any], is_chat: bool, most_tokens: int) -> Ask:
    """Read the body of /v1/chat/completions or /v1/completions.

    Args:
        body: the JSON object.
        is_chat: which of the two.
        most_tokens: of an answer.

    Raises:
        RefusedError: 400 with the field's name.
    """
    text_field = "messages" if is_chat else "prompt"
    _check_fields(body, _TEXT_FIELDS | {text_field})
    fields: dict[str, Any] = {}
    if is_chat:
        fields["messages"] = _read_messages(body.get("messages"))
    else:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise RefusedError(400, "`prompt` must be one text", "prompt")
        fields["prompt"] = prompt
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    limit = body.get(name)
    if limit is None:
        limit = most_tokens
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= most_tokens:
        raise RefusedError(400, f"`{name}` must be a whole number from 1 to {most_tokens}", name)
    fields["max_new_tokens"] = limit
    stop = body.get("stop")
    stop = [stop] if isinstance(stop, str) else stop
    if stop is not None:
        if (
            not isinstance(stop, list)
            or len(stop) > _MOST_STOPS
            or not all(isinstance(one, str) and one for one in stop)
        ):
            raise RefusedError(400, f"`stop` must be a text or up to {_MOST_STOPS} texts, none empty", "stop")
        fields["stop"] = stop
    fields |= _read_sampling(body)
    stream, options = body.get("stream") or False, body.get("stream_options") or {}
    if not isinstance(stream, bool):
        raise RefusedError(400, "`stream` must be true or false", "stream")
    if not isinstance(options, dict):
        raise RefusedError(400, "`stream_options` must be an object", "stream_options")
    return Ask(fields, is_chat, stream, bool(options.get("include_usage")))


def read_texts(body: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Read the body of /v1/embeddings: the texts, and whether vectors are wanted in base64.

    Raises:
        RefusedError: 400 with the field's name.
    """
    _check_fields(body, _EMBEDDING_FIELDS)
    texts = body.get("input")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not 1 <= len(texts) <= _MOST_TEXTS:
        raise RefusedError(400, f"`input` must be a text or a list of up to {_MOST_TEXTS}", "input")
    if not all(isinstance(text, str) and text for text in texts):
        raise RefusedError(400, "`input` must be texts, none of them empty", "input")
    encoding = body.get("encoding_format")
    encoding = "float" if encoding is None else encoding
    if encoding not in ("float", "base64"):
        raise RefusedError(400, "`encoding_format` must be float or base64", "encoding_format")
    if body.get("dimensions") is not None:
        raise RefusedError(400, "`dimensions` can't be chosen: the model's vectors have theirs", "dimensions")
    return texts, encoding == "base64"


def spell_vectors(model: str, vectors: Sequence[Sequence[float]], tokens: int, as_base64: bool) -> dict[str, Any]:
    """Return the body of /v1/embeddings' answer."""

    def spelled(vector: Sequence[float]) -> Any:
        return base64.b64encode(np.array(vector, "<f4").tobytes()).decode("ascii") if as_base64 else list(vector)

    data = [
        {"object": "embedding", "index": index, "embedding": spelled(vector)} for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


class Spelling:
    """The answers to one request.

    Args:
        model: its name.
        ask: the request.
        number: makes the id.
    """

    def __init__(self, model: str, ask: Ask, number: int) -> None:
        self._ask = ask
        self._kind = "chat.completion" if ask.is_chat else "text_completion"
        prefix = "chatcmpl" if ask.is_chat else "cmpl"
        self._head = {"id": f"{prefix}-{number}", "created": int(time.time()), "model": model}

    def whole(self, generation: Generation) -> dict[str, Any]:
        """Return the body of an answer that comes at once."""
        message = {"role": "assistant", "content": generation.text}
        content = {"message": message} if self._ask.is_chat else {"text": generation.text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _FINISH_REASONS[generation.finish_reason]}
        return {**self._head, "object": self._kind, "choices": [choice], "usage": _usage(generation)}

    def first(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        return [self._chunk({"role": "assistant", "content": ""}, None)] if self._ask.is_chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """Return a piece of a stream."""
        return self._chunk({"content": text} if self._ask.is_chat else text, None)

    def last(self, generation: Generation) -> list[dict[str, Any]]:
        """Return what a stream ends with."""
        end = self._chunk({} if self._ask.is_chat else "", _FINISH_REASONS[generation.finish_reason])
        if not self._ask.with_usage:
            return [end]
        return [end, {**self._head, "object": end["object"], "choices": [], "usage": _usage(generation)}]

    def _chunk(self, content: Any, finish_reason: str | None) -> dict[str, Any]:
        key = "delta" if self._ask.is_chat else "text"
        choice = {"index": 0, key: content, "logprobs": None, "finish_reason": finish_reason}
        kind = "chat.completion.chunk" if self._ask.is_chat else self._kind
        return {**self._head, "object": kind, "choices": [choice]}


def _usage(generation: Generation) -> dict[str, int]:
    prompt, answer = generation.prompt_tokens, generation.generated_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _read_sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return how tokens are chosen; a request without a seed gets one of its own."""
    found = {name: body[name] for name in SAMPLING_OPTIONS if body.get(name) is not None}
    for name, value in found.items():
        try:
            check_number(name, value)
        except InputError as error:
            raise RefusedError(400, error.message, name) from error
        is_greedy = name == "top_p" and value == 0
        if not is_greedy and (rule := broken_rule(name, value)):
            raise RefusedError(400, f"`{name}` {rule}", name)
    if found.get("top_p") == 0:  # the API takes it: the likeliest token alone
        found |= {"top_p": 1.0, "temperature": 0.0}
    return {"seed": secrets.randbits(63)} | found


def _check_fields(body: Mapping[str, Any], known: set[str]) -> None:
    """Refuse what would change the answer and is not known."""
    for name, value in body.items():
        if name in known | _HARMLESS or value is None:
            continue
        if name not in _NEUTRAL:
            raise RefusedError(400, f"unknown field `{name[:64]}`", name[:64])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL[name]):
            raise RefusedError(400, f"`{name}` is not supported", name)


def _read_messages(messages: Any) -> list[dict[str, str]]:
    """Return role and text of each message; a text may come in parts."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError(400, "`messages` must be a list of messages, at least one", "messages")
    read = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedError(400, f"`{param}` must be an object with `role` and `content`", param)
        content = message.get("content")
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
            if len(parts) < len(content) or not all(isinstance(part.get("text"), str) for part in parts):
                raise RefusedError(400, f"`{param}.content` may have parts of text only", param)
            content = "".join(part["text"] for part in parts)
        if not isinstance(content, str):
            raise RefusedError(400, f"`{param}.content` must be a text", param)
        role = "system" if message["role"] == "developer" else message["role"]
        read.append({"role": role, "content": content})
    return read
