"""What every decoder under inference has in common: tokens in, logits out, and how far it has come."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, LlmfastError, OptionError, UnsupportedError

CACHE_HINT = "export it with its cache, e.g. optimum's --task text-generation-with-past"

# Positions of a common beginning are shared in whole multiples of this. Matrix kernels work on tiles of rows; cut
# between tiles, the sums of both parts stay those of the whole.
_TILE = 16
# Attention over one token is another kernel than over several; what follows a common beginning must be several.
_LEAST_REST = 2


class Decoder(ABC):
    """A decoder and the tokens it has seen, batch 1.

    Attributes:
        note: what a user should know before reading its speeds; empty when there is nothing.
        session: the ONNX Runtime session.
        vocab_size: rows of the logits.
        context_length: positions the model was made for.
        capacity: positions the KV cache holds.
        length: positions it holds now.
        load_s: seconds it took to open the session.
        resumes_prompts: tokens that follow others are read as fast as the first ones, so that what a prompt has in
            common with the cache is worth keeping.
    """

    note = ""
    resumes_prompts = True
    session: Any
    vocab_size: int
    context_length: int
    capacity: int
    length: int
    load_s: float

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens and return the logits of the last one.

        Args:
            ids: int64 [n], n >= 1.

        Returns:
            float32 [vocab].

        Raises:
            InputError: no token, one the model does not know, or more than the context holds.
        """

    @abstractmethod
    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits.

        Returns:
            float32 [vocab], a view that the next call overwrites.

        Raises:
            InputError: the context is full.
        """

    @abstractmethod
    def score_last(self, ids: np.ndarray, count: int) -> np.ndarray:
        """Append tokens and return the logits of the last ones.

        Args:
            ids: int64 [n], n >= 1.
            count: how many, from 1 to n.

        Returns:
            float32 [count, vocab].

        Raises:
            InputError: as `prefill`.
        """

    @property
    def sessions(self) -> tuple[Any, ...]:
        """All ONNX Runtime sessions; the one that decodes is the first."""
        return (self.session,)

    def score(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits at every position, float32 [n, vocab], starting from an empty context."""
        self.reset()
        return self.score_last(ids, len(ids))

    def reset(self) -> None:
        """Forget all tokens."""
        self.rollback(0)

    def rollback(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back from {self.length} to {length}")
        self.length = length

    def _check(self, ids: np.ndarray, length: int) -> None:
        """Refuse tokens that can't follow `length` others."""
        if len(ids) == 0:
            raise InputError("empty prompt: it has no token")
        if length + len(ids) > self.capacity:
            raise self._full(length + len(ids))
        low, high = int(np.min(ids)), int(np.max(ids))
        if low < 0 or high >= self.vocab_size:
            raise InputError(
                f"token {low if low < 0 else high} is not in the model: its vocabulary has {self.vocab_size}",
                "the tokenizer belongs to another model",
            )

    def _full(self, tokens: int) -> InputError:
        excess = tokens - self.capacity
        return InputError(
            f"too long: {tokens} tokens, the context holds {self.capacity}; {excess} too many", "shorten the prompt"
        )


@contextmanager
def runs(model: Path) -> Iterator[None]:
    """Say of a foreign graph that fails in its first passes that it is unsupported."""
    try:
        yield
    except LlmfastError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        reason = str(error).strip().splitlines()[0][:300]
        raise UnsupportedError(f"`{model}` does not run as a decoder: {reason}", CACHE_HINT) from error


def check_sizes(max_length: int | None, chunk_tokens: int) -> None:
    """Refuse sizes that hold no token."""
    if chunk_tokens < 1:
        raise OptionError(f"chunk of {chunk_tokens} tokens: must be at least 1")
    if max_length is not None and max_length < 1:
        raise OptionError(f"length of {max_length} tokens: must be at least 1")


def context_length(bundle: ModelBundle) -> int:
    """Return the positions that a model was made for.

    Raises:
        InputError: neither manifest nor config says.
    """
    found = bundle.manifest.architecture.get("context_length")
    if type(found) is not int or found < 1:
        raise InputError(f"`{bundle.path}` does not say how long its context is", "copy config.json beside the model")
    return found


def cuts(start: int, end: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Return begin and end of the parts in which a prompt goes through the graph: cut at whole chunks from 0."""
    inner = range((start // chunk_tokens + 1) * chunk_tokens, end, chunk_tokens)
    places = [start, *inner, end]
    return list(pairwise(places))


def common_beginning(held: np.ndarray, ids: np.ndarray) -> int:
    """Return how many positions of a prompt that a cache holds another prompt can take over without other sums.

    Args:
        held: int64 [m], the prompt in the cache.
        ids: int64 [n].
    """
    # The last token of what a cache holds may have gone through the graph alone.
    count = min(len(held) - 1, len(ids) - _LEAST_REST)
    if count < _TILE:
        return 0
    differs = np.flatnonzero(held[:count] != ids[:count])
    return int(differs[0] if len(differs) else count) // _TILE * _TILE
