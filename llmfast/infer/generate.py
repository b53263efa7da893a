"""Text from a prompt, piece by piece: prefill, then decode until an end token, a stop string or a limit."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from llmfast.errors import InputError, OptionError
from llmfast.infer.decoder import Decoder
from llmfast.infer.sampling import Sampling, sample
from llmfast.tokenizer import Tokenizer, TokenStream

MAX_TOKENS = 256

FinishReason = Literal["stop", "length", "eos"]


@dataclass(frozen=True)
class Generation:
    """An answer and how it came about.

    Attributes:
        text: the answer, without the stop string.
        prompt_tokens: tokens of the prompt.
        generated_tokens: tokens of the answer, the end token not counted.
        ttft_s: seconds from the prompt's tokens to the first token: prefill and one sampling.
        decode_tokens_per_s: steps per second after the first token; None without such a step. The
            time that the reader of the pieces takes is not counted.
        finish_reason: a stop string, the limit of tokens or of the context, or an end token.
    """

    text: str
    prompt_tokens: int
    generated_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None
    finish_reason: FinishReason


class StopFilter:
    """Let text through up to the first stop string.

    Text that may be the beginning of a stop string is held back until it is known not to be. When
    several stop strings occur, the one that is complete first counts, so how the text was cut into
    pieces makes no difference.

    Args:
        stop: strings that end the text, none of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text and return what can be shown; `found` says whether it ends there."""
        text = self._held + piece
        matches = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if matches:
            end, negative_length = min(matches)
            self.found = True
            self._held = ""
            return text[: end + negative_length]
        shown = len(text) - self._doubtful(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return the text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _doubtful(self, text: str) -> int:
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0


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
    """
    if raw or tokenizer.chat_template is None:
        if system is not None:
            reason = "--raw leaves it out" if raw else "the model has none"
            raise OptionError(f"--system needs a chat template: {reason}", "put it into the prompt")
        return np.array(tokenizer.encode(prompt), np.int64)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages)
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int64)


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

    Raises:
        OptionError: max_tokens below 1, or an empty stop string.
        InputError: the prompt is empty or leaves no room in the context.
    """
    check_limits(max_tokens, stop)
    room = engine.capacity - len(prompt_ids)
    if room < 1:
        raise InputError(
            f"prompt too long: {len(prompt_ids)} tokens, the context holds {engine.capacity}",
            "shorten it; the answer needs room too",
        )
    times = _Times()
    tokenizer.check_fits(engine.vocab_size)
    vocab_size = min(tokenizer.vocab_size, engine.vocab_size)
    tokens = _choose_tokens(engine, prompt_ids, vocab_size, sampling, times)
    stream = TokenStream(tokenizer, prompt_ids.tolist())
    filtered = StopFilter(stop)
    text = ""
    count = 0
    finish_reason: FinishReason = "length"
    for token in islice(tokens, min(max_tokens, room)):
        if token in eos_ids:
            finish_reason = "eos"
            break
        count += 1
        piece = filtered.push(stream.push(token))
        if piece:
            text += piece
            yield piece
        if filtered.found:
            finish_reason = "stop"
            break
    rest = filtered.flush()
    if rest:
        text += rest
        yield rest
    return Generation(text, len(prompt_ids), count, times.ttft_s, times.decode_tokens_per_s, finish_reason)


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
    steps: int = 0

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.steps / self.decode_s if self.steps else None


def _choose_tokens(
    engine: Decoder, prompt_ids: np.ndarray, vocab_size: int, sampling: Sampling, times: _Times
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, without end; only the work on them counts in `times`."""
    rng = np.random.default_rng(sampling.seed)
    seen = set(prompt_ids.tolist())
    engine.reset()
    start = time.perf_counter()
    token = sample(engine.prefill(prompt_ids)[:vocab_size], sampling, rng, seen)
    times.ttft_s = time.perf_counter() - start
    while True:
        yield token
        start = time.perf_counter()
        seen.add(token)
        token = sample(engine.decode(token)[:vocab_size], sampling, rng, seen)
        times.decode_s += time.perf_counter() - start
        times.steps += 1
