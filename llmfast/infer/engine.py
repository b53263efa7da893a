"""Prefill and decode of a decoder over one preallocated KV cache.

Every layer's past and present are bound to the same memory, a slab of `capacity` positions: the
attention kernel writes new positions in place and no step copies the cache. What a step tells the
graph are a few numbers, written into arrays that were bound once.

A bundle may have a second graph that reads prompts (`llmfast.quantize.hybrid`): a session of its own over the
same memory.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.bundle import PREFILL, ModelBundle
from llmfast.errors import InputError, ResourceError, UnsupportedError
from llmfast.graph.feeds import CONTRACT, DTYPES, PAST, present_of
from llmfast.infer.decoder import Decoder, check_sizes, context_length, cuts
from llmfast.resources import require_memory
from llmfast.runtime import import_onnxruntime, open_session

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class _Step:
    """One shape of a step, bound once: write `input_ids`, run `binding` on `session`, read `logits`.

    The arrays are held here because not every ONNX Runtime keeps what is bound alive.
    """

    input_ids: np.ndarray
    num_logits: np.ndarray
    logits: np.ndarray
    binding: Any
    session: Any


class Engine(Decoder):
    """A decoder over one cache that is never copied.

    Attributes:
        prompt_session: reads prompts; the same as `session` unless the bundle has a graph of its own for them.
        ids_dtype: of the token ids that the graph takes.
        chunk_tokens: tokens of a prompt that go through the graph at once.
        takes_rows: sequences of different lengths may run side by side: the graph is llmfast's own, not one adapted
            from another exporter's, and the cache is in this process's memory.

    Args:
        bundle: a text-generation bundle; `open_decoder` says which graphs this engine runs.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        max_length: positions that will be needed; None means the model's whole context.
        chunk_tokens: tokens of a prompt that go through the graph at once.
        spin: let idle threads spin.
        prepack: copy weights for speed; see `open_session`.
        graph: a serialized model to run in place of the bundle's, over the same external weights.
        verify_rows: numbers of rows that the graph verifies; see `llmfast.graph.verify`. Without `graph` it is the one
            for prompts that does, and rounds otherwise than the one that decodes.
        block_base: see `open_session`.

    Raises:
        InputError: the two graphs of the bundle have different caches.
        UnsupportedError: the graph is no decoder of llmfast's kind.
        ResourceError: no memory for the KV cache.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        provider: str = "cpu",
        threads: int | None = None,
        max_length: int | None = None,
        chunk_tokens: int = 256,
        spin: bool = True,
        prepack: bool = True,
        graph: bytes | None = None,
        verify_rows: tuple[int, ...] = (),
        block_base: int = 0,
    ) -> None:
        check_sizes(max_length, chunk_tokens)
        ort = import_onnxruntime()
        start = time.perf_counter()
        prompt_graph = bundle.graphs.get(PREFILL)
        # Threads that go on spinning after a run would take the cores of the other session's.
        rest = prompt_graph is not None and graph is None and bool(verify_rows)

        def opening(graph_file: Path, rest: bool, graph: bytes | None = None) -> "onnxruntime.InferenceSession":
            return open_session(graph_file, provider, threads, spin, graph, prepack, rest, block_base)

        self.session = opening(bundle.model, rest, graph)
        self.ids_dtype = _check_contract(self.session, bundle.model)
        self.prompt_session = self.session
        if prompt_graph is not None:
            self.prompt_session = opening(prompt_graph, True)
            _check_contract(self.prompt_session, prompt_graph)
            _check_same_cache(self.session, self.prompt_session, bundle)
        self._verifying = self.session if graph is not None else self.prompt_session
        self.load_s = time.perf_counter() - start
        self.context_length = context_length(bundle)
        self.vocab_size = _vocab_size(self.session)
        self.capacity = self.context_length
        if max_length is not None:
            self.capacity = min(self.capacity, -(-max_length // chunk_tokens) * chunk_tokens)
        self.length = 0
        self.chunk_tokens = chunk_tokens
        self._seqlens_k = np.zeros(1, np.int32)
        self._total_sequence_length = np.zeros((), np.int32)
        self._logits = np.empty((1, 1, self.vocab_size), np.float32)
        self.verify_rows = verify_rows
        self._steps: dict[tuple[int, int], _Step] = {}
        self._verify_steps: dict[int, _Step] = {}
        self._wrap = ort.OrtValue.ortvalue_from_numpy
        self._slab, self._memory = _allocate_slab(self.session, self.capacity)
        self._on_cpu = bool(self._memory)
        self.takes_rows = self._on_cpu and graph is None

    @property
    def sessions(self) -> tuple[Any, ...]:
        """All ONNX Runtime sessions; the one that decodes is the first."""
        return (self.session,) if self.prompt_session is self.session else (self.session, self.prompt_session)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, chunk by chunk, and return the logits of the last one."""
        self._check(ids, self.length)
        for chunk in self._chunks(ids):
            logits = self._append(self._step(self.prompt_session, len(chunk)), chunk)
        last: np.ndarray = logits[0].copy()
        return last

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits."""
        if self.length >= self.capacity:
            raise self._full(self.length + 1)
        logits: np.ndarray = self._append(self._step(self.session, 1), token)[0]
        return logits

    def copy_cache(self, length: int) -> dict[str, np.ndarray]:
        """Return keys and values of the first positions: input's name -> [1, heads, length, head size].

        Raises:
            UnsupportedError: the cache is in a device's memory.
        """
        return {name: memory[:, :, :length].copy() for name, memory in self._cpu_memory().items()}

    def load_cache(self, cache: Mapping[str, np.ndarray]) -> None:
        """Begin with positions that `copy_cache` returned, of this model.

        Raises:
            UnsupportedError: the cache is in a device's memory.
        """
        for name, memory in self._cpu_memory().items():
            self.length = cache[name].shape[2]
            memory[:, :, : self.length] = cache[name]

    def _cpu_memory(self) -> dict[str, np.ndarray]:
        if not self._on_cpu:
            raise UnsupportedError("the KV cache is in a device's memory", "use --provider cpu")
        return self._memory

    def verify(self, ids: np.ndarray) -> np.ndarray:
        """Append as many tokens as `verify_rows` has, and return the logits after each, as `decode` gives them.

        Returns:
            float32 [n, vocab], a view that the next call of as many overwrites.
        """
        self._check(ids, self.length)
        count = len(ids)
        if count not in self._verify_steps:
            logits = np.empty((1, count, self.vocab_size), np.float32)
            self._verify_steps[count] = self._bind(self._verifying, count, logits)
        return self._append(self._verify_steps[count], ids)

    def score_last(self, ids: np.ndarray, count: int) -> np.ndarray:
        """Append tokens, chunk by chunk, and return the logits of the last ones, of the graph that decodes."""
        self._check(ids, self.length)
        scores = np.empty((count, self.vocab_size), np.float32)
        steps: dict[tuple[int, int], _Step] = {}  # not kept: their logits may take 100 MiB
        start = -len(ids)  # counted from the end, as the scores are
        for chunk in self._chunks(ids):
            stop = start + len(chunk)
            wanted = min(len(chunk), max(0, stop + count))
            shape = len(chunk), wanted
            if shape not in steps:
                logits = np.empty((1, wanted, self.vocab_size), np.float32) if wanted else self._logits
                steps[shape] = self._bind(self.session, len(chunk), logits)
            rows = self._append(steps[shape], chunk)
            if wanted:
                scores[count + stop - wanted : count + stop] = rows
            start = stop
        return scores

    def _append(self, step: _Step, ids: np.ndarray | int) -> np.ndarray:
        count = step.input_ids.shape[1]
        step.input_ids[0, :] = ids
        self._seqlens_k[0] = self.length + count - 1
        self._total_sequence_length[()] = self.length + count
        if not self._on_cpu:
            self._bind_numbers(step.binding, step.input_ids)  # a device has its own copy of them
        step.session.run_with_iobinding(step.binding)
        self.length += count
        logits: np.ndarray = step.logits[0]
        return logits

    def _step(self, session: Any, count: int) -> _Step:
        key = id(session), count
        if key not in self._steps:
            self._steps[key] = self._bind(session, count, self._logits)
        return self._steps[key]

    def _bind(self, session: Any, count: int, logits: np.ndarray) -> _Step:
        binding = session.io_binding()
        input_ids = np.zeros((1, count), self.ids_dtype)
        num_logits = np.array([logits.shape[1]], np.int64)
        self._bind_numbers(binding, input_ids)
        binding.bind_ortvalue_input("num_logits", self._wrap(num_logits))
        binding.bind_ortvalue_output("logits", self._wrap(logits))
        for name, value in self._slab.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(present_of(name), value)
        return _Step(input_ids, num_logits, logits, binding, session)

    def _bind_numbers(self, binding: Any, input_ids: np.ndarray) -> None:
        binding.bind_ortvalue_input("input_ids", self._wrap(input_ids))
        binding.bind_ortvalue_input("seqlens_k", self._wrap(self._seqlens_k))
        binding.bind_ortvalue_input("total_sequence_length", self._wrap(self._total_sequence_length))

    def _chunks(self, ids: np.ndarray) -> list[np.ndarray]:
        """Cut tokens where a prompt is cut that begins at position 0, so that sums are the same."""
        start = self.length
        return [ids[a - start : b - start] for a, b in cuts(start, start + len(ids), self.chunk_tokens)]


def _allocate_slab(
    session: "onnxruntime.InferenceSession", capacity: int
) -> tuple[dict[str, "onnxruntime.OrtValue"], dict[str, np.ndarray]]:
    """Return every past where its provider wants it, and the same memory as arrays where that is the CPU's."""
    create = import_onnxruntime().OrtValue
    inputs = [entry for entry in session.get_inputs() if entry.name.startswith(PAST)]
    sizes = [entry.shape[1] * entry.shape[3] * np.dtype(DTYPES[entry.type]).itemsize for entry in inputs]
    # Pages are had when they are written to: what is too large would be killed in the middle of an answer.
    require_memory(sum(sizes) * capacity, f"a KV cache of {capacity} tokens", "ask for fewer tokens with --max-tokens")
    slab, arrays = {}, {}
    try:
        for entry, info in zip(session.get_inputs(), session.get_input_memory_infos(), strict=True):
            if not entry.name.startswith(PAST):
                continue
            device = info.name.lower()
            shape, dtype = (1, entry.shape[1], capacity, entry.shape[3]), DTYPES[entry.type]
            if device == "cpu":
                arrays[entry.name] = np.zeros(shape, dtype)
                slab[entry.name] = create.ortvalue_from_numpy(arrays[entry.name])
            else:
                slab[entry.name] = create.ortvalue_from_shape_and_type(shape, dtype, device, info.device_id)
    except MemoryError as error:
        raise ResourceError(f"not enough memory for a KV cache of {capacity} tokens", "ask for fewer tokens") from error
    return slab, arrays


def _check_contract(session: "onnxruntime.InferenceSession", model: Path) -> type[np.generic]:
    """Return the type of the token ids."""
    inputs = {entry.name: entry for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]
    past = [name for name in inputs if name.startswith(PAST)]
    missing = [name for name in (*CONTRACT, f"{PAST}0.key") if name not in inputs]
    missing += [name for name in ("logits", *map(present_of, past)) if name not in outputs]
    if missing:
        raise UnsupportedError(
            f"`{model}` is not a decoder llmfast can run: it lacks `{missing[0]}`",
            "make it with `llmfast export`, or give a decoder that was exported with its cache (past_key_values)",
        )
    if unknown := [name for name in inputs if name not in (*CONTRACT, *past)]:
        hint = "give the bundle's directory, not its decoder alone" if unknown[0] == "encoder_attention_mask" else ""
        raise UnsupportedError(f"`{model}` is no decoder on its own: it wants the input `{unknown[0]}`", hint)
    for name in past:
        shape, dtype = inputs[name].shape, inputs[name].type
        if dtype not in DTYPES or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
            raise UnsupportedError(
                f"`{model}`: `{name}` is {dtype} {shape}, not [batch, number of heads, past, head size] of a known type"
            )
    for name, axis, word in (("input_ids", 0, "batch"), ("input_ids", 1, "seq"), *((name, 2, "past") for name in past)):
        size = inputs[name].shape[axis]
        if isinstance(size, int) and (word, size) != ("batch", 1):
            raise UnsupportedError(
                f"`{model}`: axis {axis} ({word}) of `{name}` is fixed at {size}, and must be free",
                "export it with dynamic axes",
            )
    ids = inputs["input_ids"].type
    if ids not in ("tensor(int64)", "tensor(int32)"):
        raise UnsupportedError(f"`{model}`: `input_ids` is {ids}, not integers")
    return DTYPES[ids]


def _check_same_cache(first: Any, second: Any, bundle: ModelBundle) -> None:
    """Refuse two graphs that can't take over each other's cache."""

    def cache(session: Any) -> dict[str, Any]:
        past = [entry for entry in session.get_inputs() if entry.name.startswith(PAST)]
        return {entry.name: (entry.type, entry.shape[1], entry.shape[3]) for entry in past}

    if cache(first) != cache(second):
        raise InputError(f"the graphs of `{bundle.path}` have different caches", "make the bundle again")


def _vocab_size(session: "onnxruntime.InferenceSession") -> int:
    return next(int(entry.shape[-1]) for entry in session.get_outputs() if entry.name == "logits")
