"""An encoder-decoder at work: sources encoded once, targets decoded over one preallocated cache.

The encoder's keys and values stay where ONNX Runtime put them and are bound to the decoder as they are.
The decoder's own cache is one slab that the attention kernel writes in place; reordering beams copies only
the positions in which a row differs from the one it takes over.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, ResourceError, UnsupportedError
from llmfast.graph.feeds import CROSS, FEATURES, PAST
from llmfast.runtime import import_onnxruntime, open_session

if TYPE_CHECKING:
    import onnxruntime

ROLES = ("encoder", "decoder")


@dataclass(frozen=True)
class _Step:
    """One shape of a step, bound once: write `input_ids`, run `binding`, read `logits`."""

    input_ids: np.ndarray
    num_logits: np.ndarray
    logits: np.ndarray
    binding: Any


class Seq2SeqEngine:
    """An encoder-decoder, the sources it has encoded, and the targets it has decoded so far.

    Args:
        bundle: a bundle of an encoder and a decoder graph, as llmfast exports it.
        provider: a name in `llmfast.providers`; the cache lives in the CPU's memory.
        threads: intra-op threads; None takes the cores this process may use.

    Attributes:
        encoder, session: the ONNX Runtime sessions of the encoder and the decoder.
        vocab_size: rows of the logits.
        context_length: positions of a source of tokens, and of a target; None is any number.
        features: the shape of a source that is no text, bands and frames of a spectrogram; None is tokens.
        length: positions of the targets in the cache.
        load_s: seconds it took to open the sessions.

    Raises:
        UnsupportedError: the bundle is no encoder-decoder of llmfast's kind, or the provider is not the CPU.
    """

    def __init__(self, bundle: ModelBundle, provider: str = "cpu", threads: int | None = None) -> None:
        if provider != "cpu":
            raise UnsupportedError(f"provider `{provider}` can't run encoder-decoders yet", "use --provider cpu")
        graphs = bundle.graphs
        if not set(ROLES) <= set(graphs):
            raise UnsupportedError(
                f"`{bundle.path}` is no encoder-decoder: it has the graphs {', '.join(graphs)}",
                "make it with `llmfast export`",
            )
        start = time.perf_counter()
        # The encoder runs once where the decoder runs many times: its threads must not spin beside the decoder's.
        self.encoder = open_session(graphs["encoder"], provider, threads, spin=False)
        self.session = open_session(graphs["decoder"], provider, threads)
        self.load_s = time.perf_counter() - start
        self._past = [entry for entry in self.session.get_inputs() if entry.name.startswith(PAST)]
        self._cross = [entry.name for entry in self.encoder.get_outputs()]
        _check_contract(self.session, bundle, self._cross)
        self.vocab_size = next(int(one.shape[-1]) for one in self.session.get_outputs() if one.name == "logits")
        self.context_length: int | None = bundle.manifest.architecture.get("context_length")
        first = self.encoder.get_inputs()[0]
        self.features: tuple[int, int] | None = tuple(first.shape[1:]) if first.name == FEATURES else None
        self.length = 0
        self._wrap = import_onnxruntime().OrtValue.ortvalue_from_numpy
        self._mask = np.ones((0, 0), np.int64)
        self._sources: list[Any] = []
        self._steps: dict[int, _Step] = {}
        self._slab = np.empty((0, 0, 0, 0, 0), np.float32)
        self._origin = np.empty((0, 0), np.int64)
        self._seqlens_k = np.zeros(0, np.int32)
        self._total_sequence_length = np.zeros((), np.int32)
        self._written = 0

    @property
    def num_sources(self) -> int:
        """How many sources are encoded."""
        return len(self._mask)

    def encode(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> None:
        """Encode sources; the targets decoded before are forgotten.

        Args:
            input_ids: int64 [batch, source], padded on the right.
            attention_mask: int64 [batch, source], 1 for tokens and 0 for padding.

        Raises:
            InputError: a source without a token, longer than the model's positions, or with tokens it does not know.
        """
        if input_ids.size == 0 or not attention_mask.any(axis=1).all():
            raise InputError("empty source: it has no token")
        if self.context_length is not None and input_ids.shape[1] > self.context_length:
            raise InputError(
                f"source too long: {input_ids.shape[1]} tokens, the model has {self.context_length} positions",
                "shorten it",
            )
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask}
        self._encode({name: np.ascontiguousarray(array, np.int64) for name, array in arrays.items()})
        self._mask = np.ascontiguousarray(attention_mask, np.int64)

    def encode_features(self, features: np.ndarray) -> None:
        """Encode spectrograms; the targets decoded before are forgotten.

        Args:
            features: float32 [batch, bands, frames], of the sizes that the graph takes.
        """
        self._encode({FEATURES: np.ascontiguousarray(features, np.float32)})
        self._mask = np.ones((len(features), self._sources[0].shape()[2]), np.int64)

    def _encode(self, arrays: Mapping[str, np.ndarray]) -> None:
        binding = self.encoder.io_binding()
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, self._wrap(array))
        for name in self._cross:
            binding.bind_output(name)
        try:
            self.encoder.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if "out of data bounds" not in str(error):
                raise
            hint = "the tokenizer belongs to another model"
            raise InputError("a token of the source is not in the model's vocabulary", hint) from error
        self._sources = list(binding.get_outputs())
        self._steps = {}

    def start(self, rows: int, capacity: int) -> None:
        """Begin empty targets.

        Args:
            rows: targets, a multiple of the sources; those of one source follow one another.
            capacity: most positions of a target.

        Raises:
            ResourceError: no memory for the cache.
        """
        heads, head_size = int(self._past[0].shape[1]), int(self._past[0].shape[3])
        shape = (len(self._past), rows, heads, capacity, head_size)
        if self._slab.shape != shape:
            try:
                self._slab = np.zeros(shape, np.float32)
            except MemoryError as error:
                raise ResourceError(
                    f"not enough memory for a cache of {rows} rows and {capacity} tokens", "ask for fewer tokens"
                ) from error
        self._origin = np.zeros((rows, capacity), np.int64)
        self._seqlens_k = np.zeros(rows, np.int32)
        self._steps = {}
        self.length = 0

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens to every target and return the logits of the last.

        Args:
            ids: int64 [rows, seq]; seq above 1 only at the start, unless there is one row.

        Returns:
            float32 [rows, vocab], a view that the next call overwrites.
        """
        seq = ids.shape[1]
        if seq not in self._steps:
            self._steps[seq] = self._bind(ids.shape, 1)
        logits: np.ndarray = self._append(self._steps[seq], ids)[:, 0]
        return logits

    def score(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits at every position of targets, one per source, from their first token on.

        Args:
            ids: int64 [batch, seq].

        Returns:
            float32 [batch, seq, vocab].
        """
        self.start(*ids.shape)
        return self._append(self._bind(ids.shape, ids.shape[1]), ids)

    def reorder(self, parents: np.ndarray) -> None:
        """Let every row go on from another one's past.

        Args:
            parents: int64 [rows], the row that each takes over.
        """
        changed = np.flatnonzero(parents != np.arange(len(parents)))
        origin = self._origin[:, : self.length]
        differs = origin[parents[changed]] != origin[changed]
        moves = [
            (row, int(parents[row]), int(different.argmax()))
            for row, different in zip(changed, differs, strict=True)
            if different.any()
        ]
        # All are read before any is written: rows may change places.
        taken = [self._slab[:, parent, :, first : self.length].copy() for _, parent, first in moves]
        for (row, _, first), values in zip(moves, taken, strict=True):
            self._slab[:, row, :, first : self.length] = values
        self._origin[changed, : self.length] = origin[parents[changed]]

    def _append(self, step: _Step, ids: np.ndarray) -> np.ndarray:
        rows, seq = ids.shape
        step.input_ids[...] = ids
        self._seqlens_k[:] = self.length + seq - 1
        self._total_sequence_length[()] = self.length + seq
        self.session.run_with_iobinding(step.binding)
        # Which computation an entry of the cache comes from: beams with a common past have copies of one.
        self._origin[:, self.length : self.length + seq] = self._written + np.arange(rows * seq).reshape(rows, seq)
        self._written += rows * seq
        self.length += seq
        return step.logits

    def _bind(self, shape: tuple[int, ...], num_logits: int) -> _Step:
        rows, _ = shape
        binding = self.session.io_binding()
        step = _Step(
            np.zeros(shape, np.int64),
            np.array([num_logits], np.int64),
            np.empty((rows, num_logits, self.vocab_size), np.float32),
            binding,
        )
        arrays = {
            "input_ids": step.input_ids,
            "num_logits": step.num_logits,
            "seqlens_k": self._seqlens_k,
            "total_sequence_length": self._total_sequence_length,
            "encoder_attention_mask": self._mask,
        }
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, self._wrap(array))
        for name, value in zip(self._cross, self._sources, strict=True):
            binding.bind_ortvalue_input(name, value)
        for entry, layer in zip(self._past, self._slab, strict=True):
            value = self._wrap(layer)
            binding.bind_ortvalue_input(entry.name, value)
            binding.bind_ortvalue_output(entry.name.replace(PAST, "present.", 1), value)
        binding.bind_ortvalue_output("logits", self._wrap(step.logits))
        return step


def _check_contract(session: "onnxruntime.InferenceSession", bundle: ModelBundle, cross: list[str]) -> None:
    inputs = [entry.name for entry in session.get_inputs()]
    wanted = ("input_ids", "seqlens_k", "total_sequence_length", "num_logits", "encoder_attention_mask")
    missing = [name for name in (*wanted, f"{PAST}0.key", f"{CROSS}0.key", *cross) if name not in inputs]
    if missing:
        raise UnsupportedError(
            f"`{bundle.path}` holds no decoder that llmfast can run: it lacks the input `{missing[0]}`",
            "make it with `llmfast export`",
        )
