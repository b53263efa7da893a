"""Quantized weights: the grid, the codes, and the nodes that compute with them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.errors import OptionError
from llmfast.graph.builder import CONTRIB, GraphBuilder
from llmfast.graph.linear import Linear

# MatMulNBits computes in int8 at this level; without it the CPU kernel is 2-3 times slower, and for
# 8-bit weights it expands the whole matrix on every call.
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
ACCURACY_INT8 = 4
# Ends the name of scales that are stored as float16.
HALF = ".half"
BLOCK_SIZES = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}  # of each width
# float16 holds eleven bits of a scale between these two, and fewer of a smaller one.
_HALF_RANGE = (2.0**-14, 65504.0)


@dataclass(frozen=True)
class Grid:
    """The values a quantized weight may take: `(code - zero_point) * scale`.

    Attributes:
        bits: width of a code.
        block_size: input features that share a scale; 0 is a whole row (per-channel).
        symmetric: the zero point is the middle of the codes and is not stored.
    """

    bits: int
    block_size: int = 0
    symmetric: bool = True

    @property
    def middle(self) -> int:
        """The code of zero on a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[N, K]` on a grid.

    Attributes:
        codes: uint8 [N, blocks, block_size]; a last block that K does not fill holds zero points.
        scales: float32 [N, blocks].
        zero_points: uint8 [N, blocks]; None on a symmetric grid.
        grid: what the codes mean.
        in_features: K.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    grid: Grid
    in_features: int

    def dequantize(self) -> np.ndarray:
        """Return the weight as float32 [N, K]."""
        middle = self.grid.middle if self.zero_points is None else self.zero_points[..., None].astype(np.float32)
        values = (self.codes.astype(np.float32) - middle) * self.scales[..., None]
        return np.asarray(values.reshape(len(self.codes), -1)[:, : self.in_features])

    def pack(self) -> np.ndarray:
        """Return the codes as MatMulNBits stores them: uint8 [N, blocks, block_size * bits / 8], low bits first."""
        return pack(self.codes, self.grid.bits)

    def pack_zero_points(self) -> np.ndarray:
        """Return the zero points as MatMulNBits stores them: uint8 [N, ceil(blocks * bits / 8)]."""
        assert self.zero_points is not None
        return pack(self.zero_points, self.grid.bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Put the codes of the last axis side by side into bytes, low bits first, the last byte filled up with zeros."""
    per_byte = 8 // bits
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)]
    places = np.pad(codes, padding).reshape(*codes.shape[:-1], -1, per_byte)
    packed: np.ndarray = np.bitwise_or.reduce(places << (np.arange(per_byte, dtype=np.uint8) * bits), axis=-1)
    return packed


def to_blocks(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Return `[N, K]` as `[N, blocks, block_size]`, the last block filled up with zeros."""
    block_size = grid.block_size or weight.shape[1]
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block_size)))
    return padded.reshape(len(weight), -1, block_size)


def largest_block_size(features: int) -> int:
    """Return the largest block size up to 128 that divides `features`, 32 when none does."""
    return next((size for size in (128, 64, 32, 16) if features % size == 0), 32)


# The weight is of the kind that the scheme's grid makes.
WriteLinear = Callable[[GraphBuilder, Linear, Any], None]


def check_block_size(block_size: int, bits: int) -> None:
    """Refuse a block size that MatMulNBits has no fast kernel for.

    Raises:
        OptionError: it has none.
    """
    if block_size not in BLOCK_SIZES[bits]:
        raise OptionError(
            f"block_size {block_size}: ONNX Runtime has no kernel for it",
            f"choose from: {', '.join(map(str, BLOCK_SIZES[bits]))}",
        )


def storable_scales(scales: np.ndarray, grid: Grid) -> np.ndarray:
    """Return float32 scales as they will be stored: those of blocks rounded to float16 where it is precise enough."""
    if not grid.block_size:
        return scales
    low, high = _HALF_RANGE
    fits = (scales >= low) & (scales <= high)
    return np.where(fits, np.where(fits, scales, 1).astype(np.float16).astype(np.float32), scales)


def store_blocks(graph: GraphBuilder, name: str, weight: QuantizedWeight) -> list[str]:
    """Store codes, scales and zero points of a block-wise weight; return their names.

    Scales are stored as float16 when that loses nothing, see `storable_scales`. The Cast to the kernel's
    float32 costs nothing at run time: its input is constant, so ONNX Runtime computes it as the model loads.
    """
    scale = f"{name}.weight_scale"
    half = np.clip(weight.scales, 0, _HALF_RANGE[1]).astype(np.float16)
    if np.array_equal(half.astype(np.float32), weight.scales):
        stored_half = graph.weight(f"{scale}{HALF}", half)
        if not graph.has(scale):  # several layers may share the weight
            graph.op("Cast", [stored_half], scale, to=TensorProto.FLOAT)
    else:
        graph.weight(scale, weight.scales)
    stored = [graph.weight(f"{name}.weight_q{weight.grid.bits}", weight.pack()), scale]
    if weight.zero_points is not None:
        stored.append(graph.weight(f"{name}.weight_zero_point", weight.pack_zero_points()))
    return stored


def write_matmul_nbits(
    graph: GraphBuilder, stored: list[str], weight: QuantizedWeight, hidden: str, output: str, bias: str = ""
) -> None:
    """Add a MatMulNBits node in the form that has a fast CPU kernel."""
    zero_points = stored[2] if len(stored) > 2 else ""
    inputs = [
        hidden,
        *stored[:2],
        *([zero_points, "", bias] if bias else [zero_points] if zero_points else []),
    ]
    graph.op(
        "MatMulNBits",
        inputs,
        output,
        CONTRIB,
        K=weight.in_features,
        N=len(weight.codes),
        bits=weight.grid.bits,
        block_size=weight.codes.shape[2],
        accuracy_level=ACCURACY_INT8,
    )


def write_blocks(graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
    """Add a linear layer whose weight is in blocks, of any width and size that has a kernel."""
    stored = store_blocks(graph, linear.name, weight)
    write_matmul_nbits(graph, stored, weight, linear.input, linear.output, linear.bias)


def write_gather(
    graph: GraphBuilder, stored: list[str], weight: QuantizedWeight, indices: str, output: str, rank: int | None
) -> None:
    """Add a look-up of rows of a block-wise weight, sharing its storage with a MatMulNBits.

    Args:
        graph: gets the nodes.
        stored: what `store_blocks` returned.
        weight: the table.
        indices: the value that says which rows.
        output: what they are called.
        rank: how many axes the indices have; None finds it out at run time.
    """
    scales = graph.constant(f"{stored[1]}.shape", [*weight.scales.shape, 1])
    column = f"{stored[1]}.column"
    if not graph.has(column):  # one table may be looked up several times: encoder and decoder of one vocabulary
        graph.op("Reshape", [stored[1], scales], column)
    blocks = graph.op(
        "GatherBlockQuantized",
        [stored[0], indices, column],
        f"{output}.blocks",
        CONTRIB,
        bits=weight.grid.bits,
        block_size=weight.codes.shape[2],
        gather_axis=0,
        quantize_axis=2,
    )
    width = weight.codes.shape[1] * weight.codes.shape[2]
    if rank is None:
        sizes = [graph.op("Shape", [indices], f"{output}.rows"), graph.constant(f"{stored[0]}.width", [width])]
        merged = graph.op("Concat", sizes, f"{output}.shape", axis=0)
    else:
        merged = graph.constant(f"{stored[0]}.merged.{rank}", [*[0] * rank, width])
    if width == weight.in_features:
        graph.op("Reshape", [blocks, merged], output)
        return
    filled_up = graph.op("Reshape", [blocks, merged], f"{output}.filled_up")
    ends = [graph.constant(f"{stored[0]}.{name}", [end]) for name, end in (("first", 0), ("last", weight.in_features))]
    graph.op("Slice", [filled_up, *ends, graph.constant("last_axis", [-1])], output)


def allow_int8_kernels(path: Path) -> None:
    """Let the layers of codes in a graph compute in int8, which is 2-3 times faster.

    They are written without, so that their products are exact where the graph is compared with PyTorch.
    """
    model = onnx.load(path, load_external_data=False)
    packed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for node in packed:
        node.attribute.append(helper.make_attribute("accuracy_level", ACCURACY_INT8))
    if packed:
        onnx.save(model, path)
