"""W8A8: signed 8-bit weights per channel, 8-bit activations with one dynamic scale per token.

y[m, n] = r[m] * s[n] * sum_k a[m, k] * w[n, k], with a = round(x / r) and r[m] = max_k |x[m, k]| / 127.
A scale per token keeps one token's outliers away from its neighbours, and a token's result does not
depend on what it is batched with. Unsigned activations times signed weights is the fast kernel on CPU.
Choose it for prompts, encoders and batches; embedding and head become 8-bit blocks.
Source: Yao et al. 2022, ZeroQuant (token-wise activation quantization), https://arxiv.org/abs/2206.01861
"""

from dataclasses import dataclass

import numpy as np

from llmfast.graph.builder import CONTRIB, GraphBuilder
from llmfast.graph.linear import Linear
from llmfast.graph.packed import Grid, QuantizedWeight, write_blocks

_ZERO_POINT = 128  # activations are stored unsigned: code = round(x / r) + 128
_BLOCKED_QUANTIZATION_OPSET = 21


@dataclass(frozen=True)
class Options:
    """Options of W8A8.

    Attributes:
        head_bits: bits of the embedding and of a head that is tied to it or named lm_head; 32 keeps floats.
    """

    head_bits: int = 8


def grid(options: Options) -> Grid:
    """Return the grid of a linear layer's weight."""
    return Grid(bits=8)


def write_linear(graph: GraphBuilder, linear: Linear, weight: QuantizedWeight) -> None:
    """Add the nodes of one linear layer; layers that share an input share its quantization."""
    if weight.grid.block_size:  # one that a plan gave a finer grid
        write_blocks(graph, linear, weight)
        return
    name = linear.name
    codes, row_scale = f"{linear.input}.q8", f"{linear.input}.row_scale"
    if not graph.has(codes):
        _quantize_rows(graph, linear, codes, row_scale)
    signed = (weight.codes[:, 0].astype(np.int16) - weight.grid.middle).astype(np.int8)
    inputs = [
        codes,
        graph.weight(f"{name}.weight_q8", signed.T),
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
