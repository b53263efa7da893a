"""Weight-only 2 bit: blocks of codes with a float16 scale and a zero point each, multiplied by MatMulNBits.

w[n, k] = (code - zero_point[n, b]) * scale[n, b]; activations are quantized inside the kernel (accuracy level 4).
Choose it for models whose 4-bit weights are read from memory and not from the cache, with gptq, and see what is left
of the answers: four values for a weight are few, and small models lose most of what they know.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from dataclasses import dataclass

from llmfast.graph.packed import Grid, WriteLinear, check_block_size, write_blocks
from llmfast.quantize.workpiece import Workpiece


@dataclass(frozen=True)
class Options:
    """Options of 2-bit weights.

    Attributes:
        block_size: input features that share a scale: 32, 64 or 128; 32 is better, and slower.
        symmetric: store no zero points; smaller, and less accurate.
        head_bits: bits of the embedding and of a head that is tied to it or named lm_head: 8, 4 (smaller, and far less
            accurate), or 32 for floats.
    """

    block_size: int = 64
    symmetric: bool = False
    head_bits: int = 8

    def __post_init__(self) -> None:
        check_block_size(self.block_size, bits=2)


def grid(options: Options) -> Grid:
    """Return the grid of a linear layer's weight."""
    return Grid(bits=2, block_size=options.block_size, symmetric=options.symmetric)


def needs_statistics(options: Options) -> bool:
    """Return whether the scheme needs a calibration text."""
    return False


def make_writer(workpiece: Workpiece, options: Options) -> WriteLinear:
    """Return what adds the nodes of a linear layer."""
    return write_blocks
