"""W8A8: signed 8-bit weights per channel, 8-bit activations with a dynamic scale per token, or a static one.

y[m, n] = r[m] * s[n] * sum_k a[m, k] * w[n, k], with a = round(x / r) and r[m] = max_k |x[m, k]| / 127.
A scale per token keeps one token's outliers away from its neighbours, and a token's result does not
depend on what it is batched with. Unsigned activations times signed weights is the fast kernel on CPU.
With --activations static each layer's input has one range, measured on the calibration text, and the graph is made of
QuantizeLinear and DequantizeLinear, for providers such as OpenVINO that want it so; it needs inputs without outliers.
Choose it for prompts, encoders and batches; embedding and head become 8-bit blocks.
Source: Yao et al. 2022, ZeroQuant (token-wise activation quantization), https://arxiv.org/abs/2206.01861
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.builder import CONTRIB, GraphBuilder
from llmfast.graph.linear import Linear
from llmfast.graph.packed import Grid, QuantizedWeight, WriteLinear, write_blocks
from llmfast.quantize.ranges import RANGES, find_range
from llmfast.quantize.workpiece import Workpiece
from llmfast.report import progress

_ZERO_POINT = 128  # activations are stored unsigned: code = round(x / r) + 128
_BLOCKED_QUANTIZATION_OPSET = 21


DYNAMIC, STATIC = "dynamic", "static"
TOKEN, TENSOR = "token", "tensor"
QDQ, OPERATOR = "qdq", "operator"

Ranges = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Options:
    """Options of W8A8.

    Attributes:
        activations: dynamic, a scale per token found at run time; or static, a calibrated scale per layer.
        granularity: what shares a dynamic scale: token, one row of a layer's input; or tensor, the whole input, which
            is faster, but lets one token's outliers coarsen all others, and a batch change its members' results.
        activation_range: what a static scale covers: minmax, percentile or entropy.
        form: how a static graph is written: qdq, for any provider; or operator, ONNX Runtime's own integer product,
            which is faster on CPU.
        head_bits: bits of the embedding and of a head that is tied to it or named lm_head: 8, 4 (smaller, and far less
            accurate), or 32 for floats.
    """

    activations: str = DYNAMIC
    granularity: str = TOKEN
    activation_range: str = "minmax"
    form: str = QDQ
    head_bits: int = 8

    def __post_init__(self) -> None:
        choices = {
            "activations": (DYNAMIC, STATIC),
            "granularity": (TOKEN, TENSOR),
            "activation_range": RANGES,
            "form": (QDQ, OPERATOR),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise OptionError(f"{name} `{getattr(self, name)}`: unknown", f"choose from: {', '.join(known)}")


def grid(options: Options) -> Grid:
    """Return the grid of a linear layer's weight."""
    return Grid(bits=8)


def needs_statistics(options: Options) -> bool:
    """Return whether the scheme needs a calibration text."""
    return options.activations == STATIC


def make_writer(workpiece: Workpiece, options: Options) -> WriteLinear:
    """Return what adds the nodes of a linear layer."""
    write: WriteLinear
    if options.activations == STATIC:
        write = partial(_write_qdq if options.form == QDQ else _write_static, _measure_ranges(workpiece, options))
    else:
        write = write_per_token if options.granularity == TOKEN else _write_per_tensor

    def write_linear(graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
        if weight.grid.block_size:  # one that a plan gave a finer grid
            write_blocks(graph, linear, weight)
        else:
            write(graph, linear, weight)

    return write_linear


def _measure_ranges(workpiece: Workpiece, options: Options) -> Ranges:
    """Return the lowest and highest value of each layer's input on the calibration text."""
    ranges = {}
    replay = workpiece.replay()
    names = list(dict.fromkeys(linear.input for linear in workpiece.linears))
    with progress("measuring ranges", len(names)) as advance:
        for name in names:
            ranges[name] = find_range(replay.until(name), options.activation_range)
            advance()
    return ranges


def _write_qdq(ranges: Ranges, graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
    """Add QuantizeLinear, DequantizeLinear and MatMul, which providers fuse into an integer product."""
    hidden, matrix = linear.input, f"{linear.name}.weight_dequantized"
    if not graph.has(f"{hidden}.dequantized"):
        codes, *static = _quantize_statically(graph, hidden, *ranges[hidden])
        graph.op("DequantizeLinear", [codes, *static], f"{hidden}.dequantized")
    if not graph.has(matrix):  # several layers may share the weight
        graph.op("DequantizeLinear", _store(graph, linear.name, weight), matrix, axis=1)
    inputs = [f"{hidden}.dequantized", matrix]
    if linear.bias:
        graph.op("Add", [graph.op("MatMul", inputs, f"{linear.output}.unbiased"), linear.bias], linear.output)
    else:
        graph.op("MatMul", inputs, linear.output)


def _write_static(ranges: Ranges, graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
    """Add the integer product itself, which takes in the bias; ONNX Runtime leaves that out when it fuses QDQ."""
    quantized = _quantize_statically(graph, linear.input, *ranges[linear.input])
    _multiply(graph, linear, weight, *quantized)


def _write_per_tensor(graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
    """Add the nodes of one linear layer whose whole input has one scale, found at run time."""
    quantized = [f"{linear.input}.{part}" for part in ("q8", "scale", "zero_point")]
    if not graph.has(quantized[0]):
        graph.ops("DynamicQuantizeLinear", [linear.input], quantized)
    _multiply(graph, linear, weight, *quantized)


def _quantize_statically(graph: GraphBuilder, hidden: str, low: float, high: float) -> list[str]:
    """Return the codes of a layer's input, their scale and their zero point."""
    scale = max((high - low) / 255, 1e-12)
    static = [
        graph.constant(f"{hidden}.scale", scale, np.float32),
        graph.constant(f"{hidden}.zero_point", np.clip(np.rint(-low / scale), 0, 255), np.uint8),
    ]
    codes = f"{hidden}.q8"
    if not graph.has(codes):
        graph.op("QuantizeLinear", [hidden, *static], codes)
    return [codes, *static]


def _store(graph: GraphBuilder, name: str, weight: QuantizedWeight) -> list[str]:
    """Store the codes int8 [K, N], scales float32 [N] and zero points int8 [N] of a layer."""
    return [
        graph.weight(f"{name}.weight_q8", _signed(weight).T),
        graph.weight(f"{name}.weight_scale", weight.scales[:, 0]),
        graph.weight(f"{name}.weight_zero_point", np.zeros(len(weight.codes), np.int8)),
    ]


def _multiply(
    graph: GraphBuilder, linear: Linear, weight: QuantizedWeight, codes: str, scale: str, zero_point: str
) -> None:
    stored, scales, zero_points = _store(graph, linear.name, weight)
    bias = [linear.bias] if linear.bias else []
    inputs = [codes, stored, scale, scales, zero_point, zero_points, *bias]
    graph.op("MatMulIntegerToFloat", inputs, linear.output, CONTRIB)


def _signed(weight: QuantizedWeight) -> np.ndarray:
    return (weight.codes[:, 0].astype(np.int16) - weight.grid.middle).astype(np.int8)


def write_per_token(graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
    """Add the nodes of one linear layer; layers that share an input share its quantization."""
    name = linear.name
    codes, row_scale = f"{linear.input}.q8", f"{linear.input}.row_scale"
    if not graph.has(codes):
        _quantize_rows(graph, linear, codes, row_scale)
    inputs = [
        codes,
        graph.weight(f"{name}.weight_q8", _signed(weight).T),
        graph.constant("int8.one", 1, np.float32),
        graph.weight(f"{name}.weight_scale", weight.scales[:, 0]),
        graph.constant("int8.zero_point", _ZERO_POINT, np.uint8),
    ]
    product = graph.op("MatMulIntegerToFloat", inputs, f"{linear.output}.per_row", CONTRIB)
    if linear.bias:
        unbiased = graph.op("Mul", [product, row_scale], f"{linear.output}.unbiased")
        graph.op("Add", [unbiased, linear.bias], linear.output)
    else:
        graph.op("Mul", [product, row_scale], linear.output)


def _quantize_rows(graph: GraphBuilder, linear: Linear, codes: str, row_scale: str) -> None:
    """Add the codes and scales of a layer's input, uint8 [..., K] and float32 [..., 1].

    A row of zeros has scale 0: its codes are arbitrary, and its products are multiplied by 0.
    """
    hidden = linear.input
    largest = graph.reduce_max(graph.op("Abs", [hidden], f"{hidden}.abs"), f"{hidden}.abs_max")
    graph.op("Mul", [largest, graph.constant("int8.step", 1 / 127, np.float32)], row_scale)
    zero_point = graph.constant("int8.zero_point", _ZERO_POINT, np.uint8)
    if graph.opset < _BLOCKED_QUANTIZATION_OPSET:
        steps = graph.op("Div", [hidden, row_scale], f"{hidden}.steps")
        graph.op("QuantizeLinear", [steps, graph.constant("int8.one", 1, np.float32), zero_point], codes)
        return
    # A block as long as the row quantizes per token in one pass, but wants a zero point for each block:
    # dividing by a huge scale leaves nothing but the zero point.
    huge = graph.constant("int8.huge", 1e30, np.float32)
    zero_points = graph.op("QuantizeLinear", [row_scale, huge, zero_point], f"{hidden}.zero_points")
    graph.op("QuantizeLinear", [hidden, row_scale, zero_points], codes, axis=-1, block_size=linear.shape[1])
