"""Weights in half precision: float16 or bfloat16 values, and the nodes that read them."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

from llmfast.graph.builder import GraphBuilder
from llmfast.graph.linear import Embedding, Linear

_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@dataclass(frozen=True)
class FloatFormat:
    """A number format that each value is rounded to by itself, to nearest, ties to even.

    Attributes:
        name: float16, bfloat16 or float32.
    """

    name: str
    block_size = 0  # there are no scales

    @property
    def dtype(self) -> np.dtype:
        """NumPy's type."""
        dtype: np.dtype = np.dtype(_DTYPES[self.name])
        return dtype

    @property
    def bits(self) -> int:
        """Width of a value."""
        return 8 * self.dtype.itemsize

    def cast(self, array: np.ndarray) -> np.ndarray:
        """Return float32 values rounded to this format; those beyond its range become infinite."""
        with np.errstate(over="ignore"):
            return array.astype(self.dtype)

    def unfit(self, array: np.ndarray) -> str:
        """Say why the format does not hold finite float32 values, empty when it does.

        It holds them when none is beyond its range, and their error |x - x'| / |x| is at most half a unit in the
        last place, as it is for every single normal number: more is lost only where subnormal ones make up the norm.
        """
        with np.errstate(over="ignore"):
            rounded = self.cast(array).astype(np.float32)
            if not np.isfinite(rounded).all():
                return f"values up to {np.abs(array).max():.3g}"
        error, power = (np.square(one, dtype=np.float64).sum() for one in (array - rounded, array))
        return "" if error <= (float(ml_dtypes.finfo(self.dtype).eps) / 2) ** 2 * power else "values near zero"

    def round(self, weight: np.ndarray) -> "FloatWeight":
        """Return float32 [N, K] in this format, or as it is where the format does not hold it."""
        chosen = FloatFormat("float32") if self.unfit(weight) else self
        return FloatWeight(chosen.cast(weight), chosen)


@dataclass(frozen=True)
class FloatWeight:
    """A weight `[N, K]` of floats.

    Attributes:
        values: [N, K].
        grid: their format.
    """

    values: np.ndarray
    grid: FloatFormat

    def dequantize(self) -> np.ndarray:
        """Return the weight as float32 [N, K]."""
        return self.values.astype(np.float32)


def write_float_linear(graph: GraphBuilder, linear: Linear, weight: FloatWeight) -> None:
    """Add a linear layer that computes in float32: ONNX Runtime widens the weight once, as it loads the model."""
    matrix = _store(graph, linear.weight, linear.as_stored(weight.values), widen=True)
    _multiply(graph, linear, linear.input, matrix, linear.output)


def write_half_linear(graph: GraphBuilder, linear: Linear, weight: FloatWeight) -> None:
    """Add a linear layer that computes in the weight's format; its input is rounded, its output widened.

    Layers that share an input share its Cast. A bias is added in float32.
    """
    rounded = f"{linear.input}.{weight.grid.name}"
    if not graph.has(rounded):
        graph.op("Cast", [linear.input], rounded, to=_onnx_type(weight.grid))
    matrix = _store(graph, linear.weight, linear.as_stored(weight.values), widen=False)
    _multiply(graph, linear, rounded, matrix, linear.output, f"{linear.output}.{weight.grid.name}")


def write_float_rows(graph: GraphBuilder, table: Embedding, weight: FloatWeight) -> None:
    """Add a look-up of rows of a table, in float32; a head that is tied to it shares what is stored."""
    values = weight.values.T if table.stored_transposed else weight.values
    matrix = _store(graph, table.weight, values, widen=True)
    if table.stored_transposed:
        matrix = _transpose(graph, matrix)
    graph.op("Gather", [matrix, table.node.input[1]], table.node.output[0])


def _store(graph: GraphBuilder, name: str, values: np.ndarray, widen: bool) -> str:
    """Store a weight once under its name and format; return it, or the float32 that a Cast makes of it."""
    if values.dtype == np.float32:
        return graph.weight(name, values)
    stored = graph.weight(f"{name}.{values.dtype.name}", values)
    widened = f"{name}.widened"
    if widen and not graph.has(widened):
        graph.op("Cast", [stored], widened, to=onnx.TensorProto.FLOAT)
    return widened if widen else stored


def _multiply(graph: GraphBuilder, linear: Linear, hidden: str, matrix: str, output: str, narrow: str = "") -> None:
    """Add the layer's own node on other inputs; of a product in `narrow` a Cast makes float32, then comes the bias."""
    if linear.is_turned:
        matrix = _transpose(graph, matrix)
    node = onnx.NodeProto()
    node.CopyFrom(linear.node)
    bias = [linear.bias] if linear.bias and not narrow else []
    del node.input[:]
    node.input.extend([hidden, matrix, *bias])
    node.output[0] = narrow or output
    node.name = narrow or node.name  # the Cast to `output` has the name of that
    graph.keep(node)
    if narrow and linear.bias:
        wide = graph.op("Cast", [narrow], f"{output}.unbiased", to=onnx.TensorProto.FLOAT)
        graph.op("Add", [wide, linear.bias], output)
    elif narrow:
        graph.op("Cast", [narrow], output, to=onnx.TensorProto.FLOAT)


def _transpose(graph: GraphBuilder, matrix: str) -> str:
    turned = f"{matrix}.transposed"
    return turned if graph.has(turned) else graph.op("Transpose", [matrix], turned, perm=[1, 0])


def _onnx_type(grid: FloatFormat) -> int:
    return int(helper.np_dtype_to_tensor_dtype(grid.dtype))
