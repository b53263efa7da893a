"""Text from a prompt, piece by piece: prefill, then decode until an end token, a stop string or a limit."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llmfast.errors import InputError, OptionError
from llmfast.infer.answer import Answer, FinishReason
from llmfast.infer.decoder import Decoder
from llmfast.infer.prompt_cache import PromptCache
from llmfast.infer.sampling import Sampling, sample
from llmfast.infer.speculate import Speculation
from llmfast.tokenizer import Tokenizer, require_bounded

MAX_TOKENS = 256


@dataclass(frozen=True)
class Generation:
    """An answer and how it came about.

    Attributes:
        text: the answer, without the stop string.
        prompt_tokens: tokens of the prompt.
        generated_tokens: tokens of the answer, the end token not counted.
        ttft_s: seconds from the prompt's tokens to the first token: prefill and one sampling.
        decode_tokens_per_s: tokens per second after the first; None without such a token. The
            time that the reader of the pieces takes is not counted.
        finish_reason: a stop string, the limit of tokens or of the context, or an end token.
        drafted_tokens: tokens that were guessed and verified.
        accepted_tokens: those of them that the model chose too.
        cached_tokens: tokens of the prompt that a file held and were not computed.
        placement: nodes of the graph on each execution provider, as ONNX Runtime tells; empty when nobody asked.
    """

    text: str
    prompt_tokens: int
    generated_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None
    finish_reason: FinishReason
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    cached_tokens: int = 0
    placement: Mapping[str, int] = field(default_factory=dict)

    def document(self, prompt: str) -> dict[str, Any]:
        """Return what is printed as JSON: the prompt as `text`, the answer as `answer`, and the rest by its name."""
        return {"text": prompt, "answer": self.text} | {
            name: value for name, value in asdict(self).items() if name != "text"
        }


def encode_prompt(tokenizer: Tokenizer, prompt: str, system: str | None = None, raw: bool = False) -> np.ndarray:
    """Return the tokens of a prompt: int64 [n].

    Args:
        tokenizer: with the chat template, if the model has one.
        prompt: what the user says, or with `raw` the text to go on with.
        system: what the assistant is told first.
        raw: leave the chat template out.

    Raises:
        OptionError: a system prompt without a chat template.
        InputError: the template refuses the conversation.
        ResourceError: it would take too long to tokenize.
    """
    require_bounded(prompt)
    check_system(tokenizer, system, raw)
    if raw or tokenizer.chat_template is None:
        return np.array(tokenizer.encode(prompt), np.int64)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages)
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int64)


def check_system(tokenizer: Tokenizer, system: str | None, raw: bool) -> None:
    """Refuse a system prompt that no chat template takes up."""
    if system is not None and (raw or tokenizer.chat_template is None):
        reason = "--raw leaves it out" if raw else "the model has none"
        raise OptionError(f"--system needs a chat template: {reason}", "put it into the prompt")


def check_limits(max_tokens: int, stop: Sequence[str]) -> None:
    """Refuse limits that allow no text, before any model is opened."""
    if max_tokens < 1:
        raise OptionError(f"--max-tokens {max_tokens}: must be at least 1")
    if "" in stop:
        raise OptionError("--stop: the empty string stops everything")


def generate(
    engine: Decoder,
    tokenizer: Tokenizer,
    prompt_ids: np.ndarray,
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] = (),
    speculation: Speculation | None = None,
    prompt_cache: PromptCache | None = None,
) -> Generator[str, None, Generation]:
    """Yield an answer in pieces of whole characters; the generator's return value is the `Generation`.

    Args:
        engine: its context is overwritten.
        tokenizer: ids beyond its vocabulary, the padding of some embeddings, are never chosen.
        prompt_ids: int64 [n].
        max_tokens: most tokens to generate; fewer when the context ends before.
        sampling: how tokens are chosen.
        stop: strings that end the answer and are not part of it.
        eos_ids: tokens that end the answer.
        speculation: over the same engine; it changes how fast the answer comes, not the answer.
        prompt_cache: holds the beginning of the prompt, perhaps.

    Raises:
        OptionError: max_tokens below 1, or an empty stop string.
        InputError: the prompt is empty or leaves no room in the context.
    """
    check_limits(max_tokens, stop)
    room = engine.capacity - len(prompt_ids)
    if room < 1:
        raise InputError(
            f"prompt too long: {len(prompt_ids)} tokens, the context holds {engine.capacity} with the answer; "
            f"{1 - room} too many",
            "shorten it",
        )
    if speculation is not None:
        speculation.begin()
    times = _Times()
    tokenizer.check_fits(engine.vocab_size)
    vocab_size = min(tokenizer.vocab_size, engine.vocab_size)
    tokens = _choose_tokens(engine, prompt_ids, vocab_size, sampling, times, speculation, prompt_cache)
    answer = Answer(tokenizer, prompt_ids.tolist(), min(max_tokens, room), stop, eos_ids)
    while answer.finish_reason is None:
        piece = answer.push(next(tokens))
        if piece:
            yield piece
    drafts = (speculation.drafted, speculation.accepted) if speculation else (0, 0)
    return Generation(
        answer.text,
        len(prompt_ids),
        answer.count,
        times.ttft_s,
        times.decode_tokens_per_s,
        answer.finish_reason,
        *drafts,
        times.cached_tokens,
    )


def finish(pieces: Generator[str, None, Generation], emit: Callable[[str], None] | None = None) -> Generation:
    """Run a generation to its end, giving every piece to `emit` as it comes."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            generation: Generation = end.value
            return generation
        if emit is not None:
            emit(piece)


@dataclass
class _Times:
    ttft_s: float = 0.0
    decode_s: float = 0.0
    tokens: int = 0
    cached_tokens: int = 0

    @property
    def decode_tokens_per_s(self) -> float | None:
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 else None


def _choose_tokens(
    engine: Decoder,
    prompt_ids: np.ndarray,
    vocab_size: int,
    sampling: Sampling,
    times: _Times,
    speculation: Speculation | None,
    prompt_cache: PromptCache | None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, without end; only the work on them counts in `times`."""
    rng = np.random.default_rng(sampling.seed)
    tokens = prompt_ids.tolist()
    seen = set(tokens)

    def choose(logits: np.ndarray) -> int:
        token = sample(logits[:vocab_size], sampling, rng, seen)
        seen.add(token)
        return token

    engine.reset()
    start = time.perf_counter()
    times.cached_tokens = prompt_cache.load(engine, prompt_ids) if prompt_cache else 0
    following = [choose(engine.prefill(prompt_ids[times.cached_tokens :]))]
    times.ttft_s = time.perf_counter() - start
    while True:
        tokens += following
        for token in following:
            times.tokens += 1
            yield token
        start = time.perf_counter()
        following = speculation.step(tokens, choose) if speculation else [choose(engine.decode(tokens[-1]))]
        times.decode_s += time.perf_counter() - start
