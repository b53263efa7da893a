"""W8A8: signed 8-bit weights per channel, 8-bit activations with one dynamic scale per token.

y[m, n] = (sum_k a[m, k] * w[n, k]) * r[m] * s[n], a = round(127 x / r) + 128, r[m] = max_k |x[m, k]|.
A scale per token keeps one token's outliers away from its neighbours, and a token's result does not
depend on what it is batched with. Unsigned activations times signed weights is the fast kernel on CPU.
Choose it for prompts, encoders and batches; embedding and head become 8-bit blocks.
Source: Yao et al. 2022, ZeroQuant (token-wise activation quantization), https://arxiv.org/abs/2206.01861
"""

from dataclasses import dataclass

import numpy as np

from llmfast.graph.builder import CONTRIB, GraphBuilder
from llmfast.graph.linear import Linear
from llmfast.graph.packed import Grid, QuantizedWeight

_MIDDLE = 128
_LARGEST = np.float32(127)
# A row of zeros must not divide by zero.
_SMALLEST_ROW = np.float32(1e-30)


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
    hidden, name = linear.input, linear.name
    row, codes = f"{hidden}.row_max", f"{hidden}.q8"
    if not graph.has(codes):
        _quantize_rows(graph, hidden, row, codes)
    signed = (weight.codes[:, 0].astype(np.int16) - _MIDDLE).astype(np.int8)
    inputs = [
        codes,
        graph.weight(f"{name}.weight_q8", signed.T),
        graph.constant("int8.activation_scale", 1 / _LARGEST, np.float32),
        graph.weight(f"{name}.weight_scale", weight.scales[:, 0]),
        graph.constant("int8.activation_zero_point", _MIDDLE, np.uint8),
    ]
    product = graph.op("MatMulIntegerToFloat", inputs, f"{linear.output}.per_row", CONTRIB)
    if not linear.bias:
        graph.op("Mul", [product, row], linear.output)
    else:
        graph.op("Add", [graph.op("Mul", [product, row], f"{linear.output}.unbiased"), linear.bias], linear.output)


def _quantize_rows(graph: GraphBuilder, hidden: str, row: str, codes: str) -> None:
    largest = graph.reduce_max(graph.op("Abs", [hidden], f"{hidden}.abs"), f"{hidden}.abs_max")
    graph.op("Max", [largest, graph.constant("int8.smallest_row", _SMALLEST_ROW, np.float32)], row)
    normalized = graph.op("Div", [hidden, row], f"{hidden}.normalized")
    scale = graph.constant("int8.activation_scale", 1 / _LARGEST, np.float32)
    zero_point = graph.constant("int8.activation_zero_point", _MIDDLE, np.uint8)
    graph.op("QuantizeLinear", [normalized, scale, zero_point], codes)
