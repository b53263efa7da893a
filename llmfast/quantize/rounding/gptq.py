"""GPTQ: round one input feature after the other, and let the features not yet rounded make up for the error.

Minimizes |X W^T - X Q^T|^2, not |W - Q|^2: after column j is rounded, the error e[j] / U[j, j] times row j of U
is taken from the columns to come, where U is the upper Cholesky factor of (X^T X + damp I)^-1.
Scales are found first, for the weight as it is, with errors weighted by each feature's power (static groups);
so columns can be taken in order of falling power without an index at run time.
Cost: K^3 per layer, seconds per layer of a small model; memory: K^2. Needs a calibration text.
Choose it for int4: it costs nothing at run time.
Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323
"""

from dataclasses import dataclass

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.packed import Grid, QuantizedWeight
from llmfast.quantize.calibrate import Statistics
from llmfast.quantize.hessian import inverse_factor
from llmfast.quantize.rounding._search import check_search, search_blocks
from llmfast.report import note

NEEDS_STATISTICS = True

_COLUMNS = 128  # columns rounded before their joint error is taken from the rest


@dataclass(frozen=True)
class Options:
    """Options of GPTQ.

    Attributes:
        damping: added to the diagonal of X^T X, as a share of its mean; ten times more when it is singular.
        sequential: take the inputs that the layers quantized so far make, not the float model's.
        search_steps: candidate ranges per block.
        search_floor: the smallest candidate, as a share of the block's range.
    """

    damping: float = 0.01
    sequential: bool = False
    search_steps: int = 12
    search_floor: float = 0.7

    def __post_init__(self) -> None:
        check_search(self.search_steps, self.search_floor)
        if not 0 < self.damping < 1:
            raise OptionError(f"damping {self.damping}: not between 0 and 1")


def quantize_weight(
    weight: np.ndarray, grid: Grid, options: Options, statistics: Statistics, name: str
) -> QuantizedWeight:
    """Quantize a weight, float32 [N, K], given the statistics of its input; a singular one falls back to rounding."""
    gram = statistics.gram
    assert gram is not None
    features = weight.shape[1]
    power = np.diagonal(gram)
    order = np.argsort(-power, kind="stable")
    factor = inverse_factor(gram[np.ix_(order, order)], options.damping)
    if factor is None:
        note(f"warning: layer `{name}`: its inputs have singular statistics: rounded to nearest")
    importance = (power + options.damping * power.mean()).astype(np.float32)
    codes, scales, zero_points = search_blocks(
        weight, grid, options.search_steps, options.search_floor, importance if power.any() else None
    )
    if factor is not None:
        block = order // codes.shape[2]
        rounded = _round_columns(weight[:, order].T, factor, scales.T[block], zero_points.T[block], grid)
        flat = codes.reshape(len(codes), -1)
        flat[:, order] = rounded.T
    return QuantizedWeight(codes, scales, None if grid.symmetric else zero_points, grid, features)


def _round_columns(
    columns: np.ndarray, factor: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, grid: Grid
) -> np.ndarray:
    """Return the codes of columns in the given order.

    Args:
        columns: float32 [K, N], the weight's columns.
        factor: float32 [K, K], upper triangular.
        scales: float32 [K, N], of each column's block.
        zero_points: uint8 [K, N].
        grid: the values the weight may take.

    Returns:
        uint8 [K, N].
    """
    columns = np.array(columns, np.float32, order="C")
    zeros = zero_points.astype(np.float32)
    codes = np.empty(columns.shape, np.uint8)
    for start in range(0, len(columns), _COLUMNS):
        stop = min(start + _COLUMNS, len(columns))
        errors = np.empty((stop - start, columns.shape[1]), np.float32)
        for column in range(start, stop):
            code = np.clip(np.rint(columns[column] / scales[column]) + zeros[column], 0, grid.largest)
            codes[column] = code
            error = (columns[column] - (code - zeros[column]) * scales[column]) / factor[column, column]
            columns[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
            errors[column - start] = error
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    return codes
