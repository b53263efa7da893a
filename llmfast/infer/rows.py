"""Several sequences side by side: one KV cache of many rows, a prompt into any row, a token for every row at once.

The cache is one slab `[rows, heads, capacity, head size]` a layer. A row is a contiguous part of it, and so are the
first n rows: a prompt runs at batch 1 bound onto its row, a step at batch n bound onto the first n, and neither
copies the cache. Rows differ in length: GroupQueryAttention takes each row's from `seqlens_k`.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmfast.errors import ResourceError
from llmfast.graph.feeds import DTYPES, PAST, present_of
from llmfast.infer.decoder import Decoder, cuts
from llmfast.infer.engine import Engine
from llmfast.runtime import import_onnxruntime


class Rows(ABC):
    """Sequences of one model, each in a row of its own.

    Attributes:
        count: how many there may be.
        capacity: positions that each may have.
        vocab_size: length of a token's logits.
        resumes_prompts: a prompt is worth computing from where it parts from another; see `Decoder`.
        is_alone: no others of the same model are at work: all threads may be taken, where the rows can.
    """

    count: int
    capacity: int
    vocab_size: int
    resumes_prompts: bool = True
    is_alone: bool = False

    @abstractmethod
    def prefill(self, row: int, ids: np.ndarray, start: int = 0) -> np.ndarray:
        """Compute a prompt from position `start` on; the row holds what comes before.

        The prompt is cut where an engine that reads it alone cuts it, so that the sums are the same.

        Args:
            row: where to.
            ids: int64 [n], the whole prompt, n > start.
            start: positions that the row already holds of it.

        Returns:
            float32 [vocab], the logits of the last token.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int], lengths: Sequence[int], first: int = 0) -> np.ndarray:
        """Append a token to some rows that follow one another.

        Args:
            tokens: one for each row.
            lengths: positions that each row holds.
            first: the first of these rows.

        Returns:
            float32 [rows, vocab], a view that the next call overwrites.
        """

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> None:
        """Let a row begin with the first positions of another."""


class SlabRows(Rows):
    """Rows of one slab, on the CPU.

    Args:
        engine: gives sessions and cuts; its own cache is not used, and takes no memory until it is.
        count: rows.
        capacity: positions of a row.
        alone: of the same model, and takes the place of `engine` while these rows are alone; None has none.

    Raises:
        ResourceError: no memory for the slab.
    """

    def __init__(self, engine: Engine, count: int, capacity: int, alone: Engine | None = None) -> None:
        self.count = count
        self.capacity = capacity
        self.vocab_size = engine.vocab_size
        self._engine, self._alone = engine, alone or engine
        self._ids_dtype = engine.ids_dtype
        self._chunk_tokens = engine.chunk_tokens
        self._wrap = import_onnxruntime().OrtValue.ortvalue_from_numpy
        past = [entry for entry in engine.session.get_inputs() if entry.name.startswith(PAST)]
        try:
            self._slab = {
                entry.name: np.zeros((count, entry.shape[1], capacity, entry.shape[3]), DTYPES[entry.type])
                for entry in past
            }
            self._logits = np.empty((count, 1, self.vocab_size), np.float32)
        except MemoryError as error:
            raise ResourceError(
                f"not enough memory for a KV cache of {count} rows and {capacity} tokens", "ask for fewer rows"
            ) from error
        self._numbers: dict[str, np.ndarray] = {
            "seqlens_k": np.zeros(count, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "num_logits": np.ones(1, np.int64),
        }
        self._steps: dict[tuple[int, int, int], tuple[np.ndarray, Any]] = {}

    def prefill(self, row: int, ids: np.ndarray, start: int = 0) -> np.ndarray:
        """Compute a prompt from position `start` on."""
        session = self._current.prompt_session
        for begin, end in cuts(start, len(ids), self._chunk_tokens):
            input_ids = ids[None, begin:end].astype(self._ids_dtype)
            binding = self._bind(session, input_ids, row)
            logits = self._run(session, input_ids, binding, [end])
        last: np.ndarray = logits[0].copy()
        return last

    def decode(self, tokens: Sequence[int], lengths: Sequence[int], first: int = 0) -> np.ndarray:
        """Append a token to some rows that follow one another."""
        session = self._current.session
        step = id(session), first, len(tokens)
        if step not in self._steps:
            input_ids = np.zeros((len(tokens), 1), self._ids_dtype)
            self._steps[step] = input_ids, self._bind(session, input_ids, first)
        input_ids, binding = self._steps[step]
        input_ids[:, 0] = tokens
        return self._run(session, input_ids, binding, [length + 1 for length in lengths])

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a row begin with the first positions of another."""
        for layer in self._slab.values():
            layer[target, :, :length] = layer[source, :, :length]

    @property
    def _current(self) -> Engine:
        return self._alone if self.is_alone else self._engine

    def _run(self, session: Any, input_ids: np.ndarray, binding: Any, totals: Sequence[int]) -> np.ndarray:
        self._numbers["seqlens_k"][: len(totals)] = np.array(totals) - 1
        self._numbers["total_sequence_length"][()] = max(totals)
        session.run_with_iobinding(binding)
        return self._logits[: len(input_ids), 0]

    def _bind(self, session: Any, input_ids: np.ndarray, first: int) -> Any:
        """Bind a step onto the rows from `first` on; what is bound must outlive the binding."""
        rows = len(input_ids)
        binding = session.io_binding()
        arrays = {"input_ids": input_ids, **self._numbers, "seqlens_k": self._numbers["seqlens_k"][:rows]}
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, self._wrap(array))
        binding.bind_ortvalue_output("logits", self._wrap(self._logits[:rows]))
        for name, layer in self._slab.items():
            value = self._wrap(layer[first : first + rows])
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(present_of(name), value)
        return binding


class OneRow(Rows):
    """A single row over an engine that has no more: another exporter's graph, or a device's memory.

    Args:
        engine: its context is overwritten.
    """

    def __init__(self, engine: Decoder) -> None:
        self.count = 1
        self.capacity = engine.capacity
        self.vocab_size = engine.vocab_size
        self.resumes_prompts = engine.resumes_prompts
        self._engine = engine

    def prefill(self, row: int, ids: np.ndarray, start: int = 0) -> np.ndarray:
        """Compute a prompt from position `start` on."""
        self._engine.rollback(start)
        return self._engine.prefill(ids[start:])

    def decode(self, tokens: Sequence[int], lengths: Sequence[int], first: int = 0) -> np.ndarray:
        """Append a token to the row."""
        self._engine.rollback(lengths[0])
        return self._engine.decode(tokens[0])[None]

    def copy(self, source: int, target: int, length: int) -> None:
        """Do nothing: the row holds its own positions."""
