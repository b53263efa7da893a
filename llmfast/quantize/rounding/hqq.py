"""Half-quadratic quantization: scales and zero points under which few weights are far off; needs no calibration text.

Minimizes the l_p norm, p < 1, of the errors of the weight itself, which forgives outliers where least squares does not:

    min over s, z, E of   sum |E|^p  +  beta/2 |W - E - (Q - z) s|^2,     Q = clip(round(W / s) + z)

by turns: E shrinks the errors toward zero (generalized soft threshold), z and s are the mean and the least-squares
fit for W - E, beta grows. Of all turns each block keeps the one with the smallest norm. Zero points are rounded in
every turn, for the fast kernels take integers only; those of the paper are floats and its scales stay as they were,
so its results are not to be expected. On symmetric grids the zero point stays in the middle.
Cost: `iterations` passes over the weight with two powers each.
Choose it to compare with rtn where there is no text.
Source: Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/
"""

from dataclasses import dataclass

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.packed import Grid, QuantizedWeight, storable_scales, to_blocks
from llmfast.quantize.rounding._blocks import Found, by_rows, cover, fit_scales, range_of, round_steps

NEEDS_STATISTICS = False

_MOST_ITERATIONS = 1000
# Errors below this share of a step count as none: a power below zero has no value there.
_SMALLEST_ERROR = np.float32(1e-6)


@dataclass(frozen=True)
class Options:
    """Options of half-quadratic quantization.

    Attributes:
        lp_norm: p, above 0 and up to 1; the smaller, the less an outlier counts.
        beta: how strictly errors count, in units of a block's first scale; the smaller, the more of them are forgiven.
        kappa: what beta is multiplied by in each turn, at least 1.
        iterations: turns.
    """

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.lp_norm <= 1:
            raise OptionError(f"lp_norm {self.lp_norm}: not above 0 and up to 1")
        if not 0 < self.beta < float("inf"):
            raise OptionError(f"beta {self.beta}: not a positive number")
        if not 1 <= self.kappa <= 2:
            raise OptionError(f"kappa {self.kappa}: not between 1 and 2")
        if not 1 <= self.iterations <= _MOST_ITERATIONS:
            raise OptionError(f"iterations {self.iterations}: not between 1 and {_MOST_ITERATIONS}")


def quantize_weight(weight: np.ndarray, grid: Grid, options: Options) -> QuantizedWeight:
    """Quantize a weight, float32 [N, K]."""
    codes, scales, zero_points = by_rows(to_blocks(weight, grid), lambda blocks: _alternate(blocks, grid, options))
    return QuantizedWeight(codes, scales, None if grid.symmetric else zero_points, grid, weight.shape[1])


def _alternate(blocks: np.ndarray, grid: Grid, options: Options) -> Found:
    unit, zeros = cover(*range_of(blocks), grid, 1.0)
    scales, beta = unit, options.beta
    best_norm = np.full(scales.shape, np.inf, np.float32)
    best_scales, best_zeros = np.empty_like(scales), np.empty_like(zeros)
    steps = np.empty_like(blocks)
    for _ in range(options.iterations):
        scales = storable_scales(scales, grid)
        round_steps(blocks, scales, zeros, grid, steps)
        errors = (blocks - steps * scales[..., None]) / unit[..., None]
        sizes = np.maximum(np.abs(errors), _SMALLEST_ERROR)
        norm = (sizes**options.lp_norm).sum(-1)
        better = norm < best_norm
        for best, now in ((best_norm, norm), (best_scales, scales), (best_zeros, zeros)):
            best[better] = now[better]
        outliers = np.sign(errors) * np.maximum(sizes - sizes ** (options.lp_norm - 1) / np.float32(beta), 0)
        target = blocks - outliers * unit[..., None]
        if not grid.symmetric:
            moved = np.rint((steps - target / scales[..., None]).mean(-1) + zeros)
            moved = np.clip(moved, 0, grid.largest)
            steps += (zeros - moved)[..., None]  # the codes stay
            zeros = moved
        scales = fit_scales(target, steps, steps, scales)
        beta *= options.kappa
    codes = round_steps(blocks, best_scales, best_zeros, grid, steps) + best_zeros[..., None]
    return codes.astype(np.uint8), best_scales, best_zeros.astype(np.uint8)
