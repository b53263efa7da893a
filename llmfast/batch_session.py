"""Encoders over a batch: a thread a part of its rows, in place of all threads on each operator.

The threads then wait for each other once a batch and not once an operator, which also bears a busy machine better, and
what an operator leaves for the next one fits into the cache of a core.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast import registry
from llmfast.kept import kept
from llmfast.runtime import open_session, resolve_threads

if TYPE_CHECKING:
    import onnxruntime

# Tokens of a part, about: fewer use the vector units badly, more leave the cache. An image counts as so many.
_PART_TOKENS = 256


@kept
def open_encoder(
    model: Path, provider: str = "cpu", threads: int | None = None, is_batch: bool = False
) -> "onnxruntime.InferenceSession | BatchSession":
    """Open an encoder for single inputs, or for batches whose rows may go through it apart.

    Args:
        model: the graph's path.
        provider: as for `open_session`.
        threads: None takes the cores this process may use.
        is_batch: mostly more than one row comes at a time.

    Raises:
        LlmfastError: as `open_session` does.
    """
    count = resolve_threads(threads)
    if not is_batch or count == 1 or "," in provider or not registry.load("providers", provider).RUNS_ROWS_APART:
        return open_session(model, provider, threads)
    session = open_session(model, provider, threads=1)
    if all(_is_free(value.shape) for value in (*session.get_inputs(), *session.get_outputs())):
        return BatchSession(session, count)
    return open_session(model, provider, threads)


class BatchSession:
    """A session of one thread that several threads run at once, each for some rows of a batch.

    Whatever else a session offers is the session's own.

    Args:
        session: of one intra-op thread; axis 0 of its inputs and outputs is the batch.
        threads: that run it.
    """

    def __init__(self, session: "onnxruntime.InferenceSession", threads: int) -> None:
        self._session = session
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rows")

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of all rows, [batch, ...] each, as the session does.

        Args:
            outputs: names; None for all.
            feeds: [batch, ...] by input name.
        """
        rows = len(next(iter(feeds.values())))
        count = min(rows, self._threads * round(max(1, _tokens(feeds) / (self._threads * _PART_TOKENS))))
        if count < 2:
            whole: list[np.ndarray] = self._session.run(outputs, feeds)
            return whole
        parts = [
            dict(zip(feeds, arrays, strict=True))
            for arrays in zip(*(np.array_split(array, count) for array in feeds.values()), strict=True)
        ]
        found = list(self._pool.map(lambda part: self._session.run(outputs, part), parts))
        return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _tokens(feeds: Mapping[str, np.ndarray]) -> int:
    """Return how many tokens a batch has, padding included."""
    first = next(iter(feeds.values()))
    return first.size if first.ndim == 2 and first.dtype.kind == "i" else len(first) * _PART_TOKENS


def _is_free(shape: Sequence[int | str | None]) -> bool:
    """Return whether axis 0 may have any size."""
    return bool(shape) and not isinstance(shape[0], int)
