"""Decoders whose cache grows: every step takes the past and gives back a longer one.

That is what optimum and plain torch.onnx exports do. Such a graph runs as it is: correct, but it copies
the whole cache at every step and computes logits at every position.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import UnsupportedError
from llmfast.graph.feeds import DTYPES, step_feeds
from llmfast.graph.model import walk
from llmfast.graph.skeleton import read_skeleton
from llmfast.infer.decoder import CACHE_HINT, Decoder, check_sizes, context_length, cuts, runs
from llmfast.runtime import import_onnxruntime, open_session

# Tokens of the passes that show what a graph can do.
_PROBE = 4
# How far logits may be off, as a share of what the context changes in them. A missing mask shows as 2 for
# SmolLM2; rounding shows as 0.6 where ONNX Runtime quantizes all activations of a pass by one scale.
_TOLERANCE, _COARSE_TOLERANCE = 0.1, 1.0
_ONE_SCALE = "DynamicQuantizeLinear"


class GrowingEngine(Decoder):
    """A decoder that returns its cache.

    Several tokens in one pass are right only if the graph masks what follows each of them. Exporters that
    traced it with one token left that out, so a few passes at the start show how many tokens it takes.

    Args:
        bundle: a text-generation bundle or another exporter's folder.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        max_length: positions that will be needed; None means the model's whole context.
        chunk_tokens: tokens of a prompt that go through the graph at once.
        spin: let idle threads spin.

    Raises:
        UnsupportedError: the graph has no cache, or one of another form, or an unknown input.
        InputError: the model does not say how long its context is.
    """

    note = "its graph copies the whole KV cache at every step; the further it gets the slower it decodes"

    def __init__(
        self,
        bundle: ModelBundle,
        provider: str = "cpu",
        threads: int | None = None,
        max_length: int | None = None,
        chunk_tokens: int = 256,
        spin: bool = True,
    ) -> None:
        check_sizes(max_length, chunk_tokens)
        self._value = import_onnxruntime().OrtValue
        start = time.perf_counter()
        self.session = open_session(bundle.model, provider, threads, spin)
        self.load_s = time.perf_counter() - start
        self.context_length = context_length(bundle)
        self.capacity = self.context_length if max_length is None else min(self.context_length, max_length)
        self.vocab_size = _vocab_size(self.session, bundle)
        self._empty = _empty_caches(self.session, bundle)
        self._present_of = _pair_caches(self.session, bundle, list(self._empty))
        inputs = self.session.get_inputs()
        self._inputs = [entry for entry in inputs if entry.name not in self._empty]
        step_feeds(self._inputs, np.zeros((1, 1), np.int64), 0)  # refuses inputs that it can't make
        memory = {entry.name: info for entry, info in zip(inputs, self.session.get_input_memory_infos(), strict=True)}
        self._device = memory[next(iter(self._empty))]
        self.length = 0
        self._cache: dict[str, Any] = {}
        self._forget(0)
        self._first_pass, self._next_pass = self._probe(bundle, chunk_tokens)
        self.resumes_prompts = self._next_pass == self._first_pass

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens and return the logits of the last one."""
        self._check(ids, self.length)
        for chunk in self._passes(ids):
            logits = self._append(chunk)
        last: np.ndarray = logits[-1].copy()
        return last

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits."""
        if self.length >= self.capacity:
            raise self._full(self.length + 1)
        logits: np.ndarray = self._append(np.array([token]))[0]
        return logits

    def score_last(self, ids: np.ndarray, count: int) -> np.ndarray:
        """Append tokens and return the logits of the last ones."""
        self._check(ids, self.length)
        return np.concatenate([self._append(chunk) for chunk in self._passes(ids)])[-count:]

    def rollback(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        before = self.length
        super().rollback(length)
        if length < before:  # to keep some positions copies them
            self._forget(length)

    def _forget(self, length: int) -> None:
        """Keep `length` positions of the cache."""
        kept = {name: cache.numpy()[:, :, :length] for name, cache in self._cache.items()} if length else self._empty
        device, number = self._device.name.lower(), self._device.device_id
        self._cache = {
            name: self._value.ortvalue_from_numpy(np.ascontiguousarray(array), device, number)
            for name, array in kept.items()
        }

    def _append(self, ids: np.ndarray) -> np.ndarray:
        """Run one pass; return the logits of its tokens, float32 [n, vocab]."""
        binding = self.session.io_binding()
        for name, array in step_feeds(self._inputs, ids[None], self.length).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        for name, cache in self._cache.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_output(self._present_of[name], self._device.name.lower(), self._device.device_id)
        self.session.run_with_iobinding(binding)
        logits, *caches = binding.get_outputs()
        self._cache = dict(zip(self._cache, caches, strict=True))
        self.length += len(ids)
        rows: np.ndarray = logits.numpy()[0].astype(np.float32, copy=False)
        return rows

    def _passes(self, ids: np.ndarray) -> list[np.ndarray]:
        """Cut tokens into as many as the graph takes at once, where a prompt is cut that begins at position 0."""
        start = self.length
        tokens = self._next_pass if start else self._first_pass
        return [ids[a - start : b - start] for a, b in cuts(start, start + len(ids), tokens)]

    def _probe(self, bundle: ModelBundle, chunk_tokens: int) -> tuple[int, int]:
        """Return how many tokens a pass takes on an empty cache, and over a cache."""
        ids = np.linspace(0, self.vocab_size - 1, min(_PROBE, self.capacity)).astype(np.int64)
        is_coarse = any(node.op_type == _ONE_SCALE for node in walk(read_skeleton(bundle.model).graph))
        tolerance = _COARSE_TOLERANCE if is_coarse else _TOLERANCE
        with runs(bundle.model):
            expected = self._try([1] * len(ids), ids)

        def agrees(*counts: int) -> bool:
            """Return whether passes of so many tokens give what one token at a time gives."""
            try:
                difference = self._try(counts, ids) - expected
            except Exception:  # a graph for one token at a time
                return False
            return bool(np.linalg.norm(difference) <= tolerance * np.linalg.norm(expected - expected.mean(0)))

        if len(ids) < _PROBE or not agrees(_PROBE):
            return 1, 1
        if not agrees(_PROBE // 2, _PROBE // 2):
            return self.capacity, 1
        return chunk_tokens, chunk_tokens

    def _try(self, counts: Sequence[int], ids: np.ndarray) -> np.ndarray:
        try:
            return np.concatenate([self._append(part) for part in np.split(ids, np.cumsum(counts)[:-1])])
        finally:
            self.length = 0
            self._forget(0)


def _vocab_size(session: Any, bundle: ModelBundle) -> int:
    shape = next((entry.shape for entry in session.get_outputs() if entry.name == "logits"), None)
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int) or shape[1] == 1:
        spelled = "no output `logits`" if shape is None else f"`logits` {shape}"
        raise UnsupportedError(f"`{bundle.model}` has {spelled}, not [batch, seq, vocabulary]", CACHE_HINT)
    return shape[2]


def _empty_caches(session: Any, bundle: ModelBundle) -> dict[str, np.ndarray]:
    """Return every cache without a position: [1, heads, 0, head size]."""
    past = [entry for entry in session.get_inputs() if entry.name.startswith("past")]
    if not past:
        raise UnsupportedError(f"`{bundle.model}` has no cache: it lacks inputs `past_key_values.*`", CACHE_HINT)
    caches: dict[str, np.ndarray] = {}
    for entry in past:
        heads, length, size = entry.shape[1:] if len(entry.shape) == 4 else (None, None, None)
        is_float = entry.type in ("tensor(float)", "tensor(float16)")
        if not is_float or not isinstance(heads, int) or isinstance(length, int) or not isinstance(size, int):
            raise UnsupportedError(
                f"`{bundle.model}`: `{entry.name}` is {entry.type} {entry.shape}, "
                "not floats [batch, number of heads, past, head size] that grow"
            )
        caches[entry.name] = np.zeros((1, heads, 0, size), DTYPES[entry.type])
    return caches


def _pair_caches(session: Any, bundle: ModelBundle, past: list[str]) -> dict[str, str]:
    """Return past -> present: by name where the names follow the custom, by order otherwise."""
    outputs = [entry.name for entry in session.get_outputs() if entry.name != "logits"]
    names = {name: name.replace("past_key_values", "present", 1) for name in past}
    if set(names.values()) <= set(outputs):
        return names
    if len(outputs) != len(past):
        raise UnsupportedError(f"`{bundle.model}` takes {len(past)} caches and gives back {len(outputs)}", CACHE_HINT)
    return dict(zip(past, outputs, strict=True))
