"""Half precision with the range of float32: bfloat16 weights, widened to float32 as the model loads.

Half the bytes on disk and in the download; speed and memory at run time are the float model's, for no CPU kernel of
ONNX Runtime multiplies bfloat16. It rounds eight times more coarsely than fp16.
Choose it for checkpoints that were trained and published in bfloat16: it holds them without any loss.
Source: Kalamkar et al. 2019, https://arxiv.org/abs/1905.12322
"""

from dataclasses import dataclass

from llmfast.graph.builder import GraphBuilder
from llmfast.graph.floats import FloatFormat, FloatWeight, write_float_linear
from llmfast.graph.linear import Linear
from llmfast.graph.packed import QuantizedWeight, WriteLinear, write_blocks
from llmfast.quantize.workpiece import Workpiece


@dataclass(frozen=True)
class Options:
    """bfloat16 has no options."""


def grid(options: Options) -> FloatFormat:
    """Return the format of a linear layer's weight."""
    return FloatFormat("bfloat16")


def needs_statistics(options: Options) -> bool:
    """Return whether the scheme needs a calibration text."""
    return False


def make_writer(workpiece: Workpiece, options: Options) -> WriteLinear:
    """Return what adds the nodes of a linear layer."""

    def write(graph: GraphBuilder, linear: Linear, weight: FloatWeight | QuantizedWeight) -> None:
        if isinstance(weight, QuantizedWeight):  # one that a plan gave blocks
            write_blocks(graph, linear, weight)
        else:
            write_float_linear(graph, linear, weight)

    return write
