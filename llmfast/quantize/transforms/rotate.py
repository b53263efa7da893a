"""Rotation: turn the residual stream by a random orthogonal matrix, which spreads its outliers over all channels.

x becomes x R wherever it is written, and what reads it through a norm is multiplied by R^T; norms give their weights
to the layers after them first. The values of attention heads are turned the same way between v_proj and o_proj.
Everything is folded into the weights, with one exception: a head that shares the embedding's table can't take in
the last norm's weight, so a hidden x hidden layer in 8 bits is put before it (0.3 % of SmolLM2's size).
Cost: a product of every weight with R, once; needs no calibration text.
Choose it for decoders with RMS norms and outliers that smoothquant does not tame; compare, for it does not always pay.
Sources: Ashkboos et al. 2024 (QuaRot), https://arxiv.org/abs/2404.00456;
Liu et al. 2024 (SpinQuant, whose R1 and R2 these are), https://arxiv.org/abs/2405.16406
"""

from dataclasses import dataclass

from llmfast.graph.linear import find_embeddings, find_linears
from llmfast.graph.packed import Grid, largest_block_size
from llmfast.graph.rotation import (
    find_residual_stream,
    find_value_heads,
    head_rotation,
    random_rotation,
    rotate_stream,
    rotate_values,
)
from llmfast.quantize.workpiece import Workpiece

NEEDS_STATISTICS = False
# Two graphs over one cache must agree on it: see quantize/hybrid.py.
TURNS_CACHE = True

_HEAD_BITS = 8


@dataclass(frozen=True)
class Options:
    """Options of rotation.

    Attributes:
        rotate_seed: of the random matrices.
        values: also rotate the values of attention heads.
    """

    rotate_seed: int = 0
    values: bool = True


def transform(workpiece: Workpiece, options: Options) -> None:
    """Rotate the model.

    Raises:
        UnsupportedError: its residual stream is touched by more than linear layers, embeddings and RMS norms.
    """
    model, edits = workpiece.model, workpiece.edits
    linears = find_linears(model)
    stream = find_residual_stream(model, linears, find_embeddings(model, linears, min_elements=0))
    rotation = random_rotation(stream.width, options.rotate_seed)
    tables = {table.weight for table in stream.embeddings}
    heads = [(linear, norm) for linear, norm in stream.readers if linear.weight in tables]
    tied = [(linear, norm, head_rotation(edits, norm, rotation)) for linear, norm in heads]
    rotate_stream(edits, stream, rotation)
    for linear, norm, matrix in tied:
        name = f"{norm.removesuffix('.weight')}.rotation"
        grid = Grid(_HEAD_BITS, largest_block_size(stream.width)) if linear.weight in workpiece.layers.grids else None
        workpiece.insert_linear(name, matrix, linear, grid)
    if options.values:
        for attention in find_value_heads(model, linears):
            rotate_values(edits, attention, random_rotation(attention.shape[1], options.rotate_seed))
