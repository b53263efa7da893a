"""Weight-only 4 bit: blocks of codes with a float16 scale and a zero point each, multiplied by MatMulNBits.

w[n, k] = (code - zero_point[n, b]) * scale[n, b]; activations are quantized inside the kernel (accuracy level 4).
Reads an eighth of the bytes of float32, so decoding, which is bound by memory, gains most.
Choose it where size and decode speed count; prompts are read faster by int8.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from dataclasses import dataclass

from llmfast.graph.packed import Grid, WriteLinear, check_block_size, write_blocks
from llmfast.quantize.workpiece import Workpiece


@dataclass(frozen=True)
class Options:
    """Options of 4-bit weights.

    Attributes:
        block_size: input features that share a scale: 16, 32, 64, 128 or 256.
        symmetric: store no zero points; smaller, and less accurate.
        head_bits: bits of the embedding and of a head that is tied to it or named lm_head: 8, 4 (smaller, and far less
            accurate), or 32 for floats.
    """

    block_size: int = 32
    symmetric: bool = False
    head_bits: int = 8

    def __post_init__(self) -> None:
        check_block_size(self.block_size, bits=4)


def grid(options: Options) -> Grid:
    """Return the grid of a linear layer's weight."""
    return Grid(bits=4, block_size=options.block_size, symmetric=options.symmetric)


def needs_statistics(options: Options) -> bool:
    """Return whether the scheme needs a calibration text."""
    return False


def make_writer(workpiece: Workpiece, options: Options) -> WriteLinear:
    """Return what adds the nodes of a linear layer."""
    return write_blocks
