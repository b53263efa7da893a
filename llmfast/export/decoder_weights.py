"""The weights of a decoder's graph: what each is made of in the checkpoint, checked before any is read."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from llmfast.errors import InputError
from llmfast.export.architectures import Decoder
from llmfast.export.checkpoint import Checkpoint
from llmfast.graph.builder import GraphBuilder
from llmfast.graph.packed import HALF, QuantizedWeight, pack

_LAYERS = "model.layers"
_QKV = ("q_proj", "k_proj", "v_proj")
_MISFIT = "weights and config.json do not belong together"
# Masks that older checkpoints hold beside their weights.
_BUFFER = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
_GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class _Weight:
    """One initializer.

    Attributes:
        parts: stored names and the shapes they must have.
        make: computes the initializer from the stored parts, or from nothing when it reads them itself.
        reads: it reads them itself.
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...]
    make: Callable[..., Any]
    reads: bool = False


class DecoderWeights:
    """Initializers in the order in which the graph first uses them.

    Every method returns the initializer's name. Names are Llama's, whatever the checkpoint calls its weights.
    """

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder) -> None:
        self._checkpoint = checkpoint
        self._decoder = decoder
        self._weights: dict[str, _Weight] = {}

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def num_bytes(self) -> int:
        """What the weights take, each stored part as 32-bit numbers; without tables that are in no checkpoint."""
        shapes = {name: shape for weight in self._weights.values() for name, shape in weight.parts}
        return 4 * sum(math.prod(shape) for shape in shapes.values())

    def constant(self, name: str, values: Any, dtype: type = np.int64) -> str:
        """Add a small constant, a shape or an axis for instance."""
        return self.computed(name, lambda: np.array(values, dtype))

    def computed(self, name: str, make: Callable[[], np.ndarray]) -> str:
        """Add a table that is in no checkpoint."""
        return self._add(name, (), make)

    def table(self, name: str, rows: int, columns: int, skipped_rows: int = 0) -> str:
        """Add an embedding `[rows, columns]`, which is stored after some rows that are not used."""
        stored = ((f"{self._stored(name)}.weight", (skipped_rows + rows, columns)),)
        return self._add(f"{name}.weight", stored, lambda array: array[skipped_rows:])

    def vector(self, name: str, size: int, kind: str = "weight", offset: float = 0.0, scale: float = 1.0) -> str:
        """Add a norm's weight or bias `[size]`, plus an offset and then scaled."""
        stored = ((f"{self._stored(name)}.{kind}", (size,)),)
        return self._add(f"{name}.{kind}", stored, lambda array: (array + np.float32(offset)) * np.float32(scale))

    def linear(self, name: str, shape: tuple[int, int], scale: float = 1.0) -> str:
        """Add a linear layer's weight of shape `(N, K)`, stored as `[K, N]` for MatMul."""
        transposed = self._decoder.stored_transposed

        def make(*arrays: np.ndarray) -> np.ndarray:
            rows = _scaled(self._rows(name, [array.T if transposed else array for array in arrays]), scale)
            columns: np.ndarray = rows.T
            return columns

        names, sizes = self._sources(name, shape[0])
        shapes = [(shape[1], size) if transposed else (size, shape[1]) for size in sizes]
        parts = tuple((f"{source}.weight", stored) for source, stored in zip(names, shapes, strict=True))
        return self._add(f"{name}.weight", parts, make)

    def experts(self, name: str, part: str, num_experts: int, shape: tuple[int, int]) -> str:
        """Add one projection of all experts, `[experts, N, K]`; `gate_up_proj` has gate and up in alternating rows.

        Rows alternate because ONNX Runtime's MoE wants them so.
        """
        sources = _GATE_UP if part == "gate_up_proj" else (part,)
        size = shape[0] // len(sources)
        prefix, stored = self._stored(name), self._decoder.stored
        parts = [
            (f"{prefix}.{expert}.{stored.get(source, source)}.weight", (size, shape[1]))
            for expert in range(num_experts)
            for source in sources
        ]

        def make(*arrays: np.ndarray) -> np.ndarray:
            joined = np.empty((num_experts, size, len(sources), shape[1]), np.float32)
            for index, array in enumerate(arrays):
                joined[index // len(sources), :, index % len(sources)] = array
            return joined.reshape(num_experts, *shape)

        return self._add(f"{name}.{part}.weight", parts, make)

    def packed(self, name: str, shape: tuple[int, int], scale: float = 1.0) -> tuple[list[str], dict[str, int]] | None:
        """Add the codes, scales and zero points of a linear layer that the checkpoint holds as codes.

        Returns:
            Their names and the attributes of MatMulNBits; None for a layer of floats. The name of scales stored as
            float16 ends in `.half`.

        Raises:
            InputError: only some of the stored layers that make up this one are codes.
        """
        sources, sizes = self._sources(name, shape[0])
        layers = [layer for layer in map(self._checkpoint.packed, sources) if layer]
        if not layers:
            return None
        if len(layers) < len(sources):
            raise InputError(f"`{self._checkpoint.path}`: some of {', '.join(sources)} are quantized, others are not")
        packing = layers[0].packing
        parts = tuple(
            (f"{source}.{packing.marker}", packing.stored_shape(size, shape[1]))
            for source, size in zip(sources, sizes, strict=True)
        )

        @lru_cache(maxsize=1)
        def read() -> list[QuantizedWeight]:
            return [layer.read() for layer in layers]

        def rows(part: Callable[[QuantizedWeight], Any]) -> np.ndarray:
            return self._rows(name, [part(weight) for weight in read()])

        bits = packing.bits
        is_half = scale == 1.0 and all(layer.has_half_scales for layer in layers)
        scales, dtype = (f"{name}.weight_scale{HALF}", np.float16) if is_half else (f"{name}.weight_scale", np.float32)
        stored = [
            self._add(f"{name}.weight_q{bits}", parts, lambda: pack(rows(lambda one: one.codes), bits), True),
            self._add(scales, (), lambda: _scaled(rows(lambda one: one.scales), scale).astype(dtype), True),
        ]
        if not packing.symmetric:
            zeros = f"{name}.weight_zero_point"
            stored.append(self._add(zeros, (), lambda: pack(rows(lambda one: one.zero_points), bits), True))
        attributes = {"N": shape[0], "K": shape[1], "bits": bits, "block_size": packing.block_size(shape[1])}
        return stored, attributes

    def bias(self, name: str, size: int, scale: float = 1.0) -> str:
        """Add a linear layer's bias `[N]`."""
        names, sizes = self._sources(name, size)
        parts = tuple((f"{source}.bias", (part,)) for source, part in zip(names, sizes, strict=True))
        return self._add(f"{name}.bias", parts, lambda *arrays: _scaled(self._rows(name, arrays), scale))

    def check(self) -> None:
        """Compare every shape with the checkpoint's.

        Raises:
            InputError: a weight that is missing or of another shape than the config makes it, or a layer's weight
                that the config has no place for.
        """
        for weight in self._weights.values():
            for name, expected in weight.parts:
                actual = self._checkpoint.shape(name)
                if actual != expected:
                    raise InputError(
                        f"weight `{name}` of `{self._checkpoint.path}` is {list(actual)}, its config makes it "
                        f"{list(expected)}",
                        _MISFIT,
                    )
        used = {name for weight in self._weights.values() for name, _ in weight.parts}
        used |= {name.partition(".")[2] for name in used}  # without the prefix that base models lack
        layers = self._decoder.stored.get(_LAYERS, _LAYERS).rpartition(".")[2]
        layer_weight = re.compile(rf"(.+\.)?{layers}\.\d+\..+\.(weight|bias)")
        for name in self._checkpoint.names():
            is_buffer = _BUFFER.search(name) or self._is_zero_bias(name)
            if name not in used and layer_weight.fullmatch(name) and not is_buffer:
                raise InputError(f"weight `{name}` of `{self._checkpoint.path}` has no place in its config", _MISFIT)

    def _is_zero_bias(self, name: str) -> bool:
        """Return whether a bias is one that GPTQ's programs add to every layer of codes."""
        layer, _, kind = name.rpartition(".")
        return kind == "bias" and self._checkpoint.packed(layer) is not None and not self._checkpoint.read(name).any()

    def store(self, graph: GraphBuilder, advance: Callable[[], None]) -> None:
        """Read, convert and write one weight after the other."""
        for name, weight in self._weights.items():
            graph.weight(name, weight.make(*[self._read(stored) for stored, _ in weight.parts if not weight.reads]))
            advance()

    def _add(
        self, name: str, parts: Sequence[tuple[str, tuple[int, ...]]], make: Callable[..., Any], reads: bool = False
    ) -> str:
        self._weights.setdefault(name, _Weight(tuple(parts), make, reads))
        return name

    def _read(self, name: str) -> np.ndarray:
        array = self._checkpoint.read(name)
        if not np.isfinite(array).all():
            raise InputError(
                f"weight `{name}` of `{self._checkpoint.path}` has values that are NaN or infinite",
                "the checkpoint is damaged or its training diverged",
            )
        return array

    def _stored(self, name: str) -> str:
        """Return the checkpoint's name of a module, `model.layers.3.mlp.up_proj` for instance."""
        stored = self._decoder.stored
        if not name.startswith(f"{_LAYERS}."):
            return stored.get(name, name)
        index, _, part = name.removeprefix(f"{_LAYERS}.").partition(".")
        return f"{stored.get(_LAYERS, _LAYERS)}.{index}.{stored.get(part, part)}"

    def _sources(self, name: str, size: int) -> tuple[list[str], list[int]]:
        """Return the stored modules that a linear layer is read from, and how many rows each has."""
        decoder = self._decoder
        parent, _, part = name.rpartition(".")
        if part == "qkv_proj" and decoder.qkv_layout == "split":
            sizes = [decoder.query_size, decoder.kv_size, decoder.kv_size]
            return [self._stored(f"{parent}.{one}") for one in _QKV], sizes
        if part in _GATE_UP and decoder.gate_up_packed:
            return [self._stored(f"{parent}.gate_up_proj")], [2 * size]
        return [self._stored(name)], [size]

    def _rows(self, name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Return the rows of a linear layer, in the graph's order, from those that are stored."""
        decoder, part = self._decoder, name.rpartition(".")[2]
        rows = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        if part in _GATE_UP and decoder.gate_up_packed:
            return np.split(rows, 2)[_GATE_UP.index(part)]
        if part != "qkv_proj":
            return rows
        if decoder.qkv_layout == "by_head":
            by_head = rows.reshape(decoder.num_attention_heads, 3, decoder.head_size, *rows.shape[1:])
            rows = by_head.swapaxes(0, 1).reshape(rows.shape)
        rotary = next((rotary for rotary in decoder.rotary if rotary is not None), None)
        order = None if rotary is None else rotary.head_order(decoder.head_size)
        if order is not None:
            rotated = decoder.query_size + decoder.kv_size
            heads = np.arange(rotated).reshape(-1, decoder.head_size)[:, order]
            rows = np.concatenate([rows[heads.reshape(-1)], rows[rotated:]])
        return rows


def _scaled(array: np.ndarray, scale: float) -> np.ndarray:
    return array if scale == 1.0 else array * np.float32(scale)
