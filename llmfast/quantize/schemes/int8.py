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


@dataclass(frozen=True)
class Options:
    """Options of W8A8.

    Attributes:
        activations: dynamic, a scale per token found at run time; or static, a calibrated scale per layer.
        activation_range: what a static scale covers: minmax, percentile or entropy.
        head_bits: bits of the embedding and of a head that is tied to it or named lm_head; 32 keeps floats.
    """

    activations: str = DYNAMIC
    activation_range: str = "minmax"
    head_bits: int = 8

    def __post_init__(self) -> None:
        for name, known in (("activations", (DYNAMIC, STATIC)), ("activation_range", RANGES)):
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
    if options.activations == DYNAMIC:
        return write_dynamic
    ranges = {}
    replay = workpiece.replay()
    names = list(dict.fromkeys(linear.input for linear in workpiece.linears))
    with progress("measuring ranges", len(names)) as advance:
        for name in names:
            ranges[name] = find_range(replay.until(name), options.activation_range)
            advance()

    def write_static(graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
        if weight.grid.block_size:
            write_blocks(graph, linear, weight)
        else:
            _write_static(graph, linear, weight, *ranges[linear.input])

    return write_static


def _write_static(graph: GraphBuilder, linear: Linear, weight: QuantizedWeight, low: float, high: float) -> None:
    """Add QuantizeLinear, DequantizeLinear and MatMul, which providers fuse into an integer product."""
    name, hidden = linear.name, linear.input
    if not graph.has(f"{hidden}.dequantized"):
        scale = max((high - low) / 255, 1e-12)
        inputs = [
            graph.constant(f"{hidden}.scale", scale, np.float32),
            graph.constant(f"{hidden}.zero_point", np.clip(np.rint(-low / scale), 0, 255), np.uint8),
        ]
        codes = graph.op("QuantizeLinear", [hidden, *inputs], f"{hidden}.q8")
        graph.op("DequantizeLinear", [codes, *inputs], f"{hidden}.dequantized")
    stored = [
        graph.weight(f"{name}.weight_q8", _signed(weight).T),
        graph.weight(f"{name}.weight_scale", weight.scales[:, 0]),
        graph.weight(f"{name}.weight_zero_point", np.zeros(len(weight.codes), np.int8)),
    ]
    matrix = graph.op("DequantizeLinear", stored, f"{name}.weight_dequantized", axis=1)
    inputs = [f"{hidden}.dequantized", matrix]
    if linear.bias:
        graph.op("Add", [graph.op("MatMul", inputs, f"{name}.unbiased"), linear.bias], linear.output)
    else:
        graph.op("MatMul", inputs, linear.output)


def _signed(weight: QuantizedWeight) -> np.ndarray:
    return (weight.codes[:, 0].astype(np.int16) - weight.grid.middle).astype(np.int8)


def write_dynamic(graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
    """Add the nodes of one linear layer; layers that share an input share its quantization."""
    if weight.grid.block_size:  # one that a plan gave a finer grid
        write_blocks(graph, linear, weight)
        return
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
        graph.op("Add", [graph.op("Mul", [product, row_scale], f"{name}.unbiased"), linear.bias], linear.output)
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
