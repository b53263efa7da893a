"""A line of a file of prompts becomes a request of the batch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmfast.errors import InputError
from llmfast.infer.batch import Request
from llmfast.infer.generate import MAX_TOKENS, encode_prompt
from llmfast.infer.jsonl import Line
from llmfast.infer.sampling import SAMPLING_OPTIONS, Sampling
from llmfast.tokenizer import Tokenizer

_WHOLE = ("max_new_tokens", "top_k", "seed")
FIELDS = ("id", "prompt", "messages", "max_new_tokens", "stop", *SAMPLING_OPTIONS)


@dataclass(frozen=True)
class RequestReader:
    """Makes requests of lines: `prompt` or `messages`, and what differs from these defaults.

    Attributes:
        tokenizer: the model's.
        system: what the assistant is told first, unless the messages begin with it.
        raw: leave the chat template out.
        max_tokens: most tokens of an answer; a line says `max_new_tokens`.
        stop: strings that end an answer.
        sampling: how tokens are chosen, fields of `Sampling`; its seed is that of the first line.
    """

    tokenizer: Tokenizer
    system: str | None = None
    raw: bool = False
    max_tokens: int = MAX_TOKENS
    stop: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def read(self, line: Line) -> Request:
        """Return the request of a line; its number is the request's id.

        Raises:
            LlmfastError: a field that is missing or malformed, or a prompt that the chat template refuses.
        """
        fields = line.fields
        for name in ("max_new_tokens", *SAMPLING_OPTIONS):
            if name in fields:
                check_number(name, fields[name])
        stop = fields.get("stop", self.stop)
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise InputError("`stop` is neither a text nor a list of texts")
        chosen = {name: fields[name] for name in SAMPLING_OPTIONS if name in fields}
        sampling = Sampling(**{**self.sampling, **chosen})
        return Request(
            id=line.number,
            prompt_ids=self._encode(fields),
            max_tokens=fields.get("max_new_tokens", self.max_tokens),
            sampling=sampling if "seed" in fields else sampling.of_text(line.number),
            stop=tuple(stop),
        )

    def _encode(self, fields: Mapping[str, Any]) -> np.ndarray:
        if ("prompt" in fields) == ("messages" in fields):
            raise InputError("needs `prompt` or `messages`" + (", not both" if "prompt" in fields else ""))
        if "prompt" in fields:
            if not isinstance(fields["prompt"], str):
                raise InputError("`prompt` is not a text")
            return encode_prompt(self.tokenizer, fields["prompt"], self.system, self.raw)
        messages = fields["messages"]
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise InputError('`messages` is not a list of {"role": text, "content": text}')
        if self.raw:
            raise InputError("`messages` needs the chat template, which --raw leaves out")
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        text = self.tokenizer.apply_chat_template(messages)
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), np.int64)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def check_number(name: str, value: Any) -> None:
    """Refuse a field of a request that is no finite number, or no whole one where it must be."""
    kinds = (int,) if name in _WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"`{name}` is not a {'whole ' if name in _WHOLE else ''}number")
    try:
        is_finite = name in _WHOLE or math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        is_finite = False
    if not is_finite:
        raise InputError(f"`{name}` is not a finite number")
