"""Scales and zero points of blocks, chosen for the least squared error.

For each block: w ~ (clip(round(w / s) + z) - z) * s, over a line of candidate ranges; the best one's
scale is then the least-squares fit to its codes. Errors may be weighted per input feature.
Weights that lie on such a grid already, which may reach beyond the values it was used for, keep their values.
"""

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.packed import Grid, storable_scales, to_blocks
from llmfast.quantize.rounding._blocks import Found, by_rows, cover, fit_scales, inner, range_of, round_steps

_MOST_STEPS = 1000


def check_search(steps: int, floor: float) -> None:
    """Refuse a search that can't be.

    Raises:
        OptionError: too few or too many steps, or a floor that is no share.
    """
    if not 1 <= steps <= _MOST_STEPS:
        raise OptionError(f"search_steps {steps}: not between 1 and {_MOST_STEPS}")
    if not 0 < floor <= 1:
        raise OptionError(f"search_floor {floor}: not above 0 and up to 1")


def search_blocks(weight: np.ndarray, grid: Grid, steps: int, floor: float, importance: np.ndarray | None) -> Found:
    """Find the codes, scales and zero points of a weight.

    Args:
        weight: float32 [N, K].
        grid: the values it may take.
        steps: candidate ranges per block; 1 takes the whole range.
        floor: the smallest candidate, as a share of the block's range.
        importance: float32 [K], the weight of each input feature's squared error; None is all alike.

    Returns:
        codes uint8 [N, blocks, block_size], scales float32 [N, blocks], zero points uint8 [N, blocks].
    """
    weights = None if importance is None else to_blocks(importance[None], grid)[0]
    shares = np.linspace(1.0, floor, steps, dtype=np.float32)
    return by_rows(to_blocks(weight, grid), lambda blocks: _search(blocks, grid, shares, weights))


def _grid_shares(blocks: np.ndarray, whole: np.ndarray) -> list[np.ndarray]:
    """Return the ranges, as shares [N, blocks], under which blocks that lie on a grid already stay as they are.

    The step of such a block is the smallest distance of two values, of which one may be 0, or a whole part of it.
    Weights that were never rounded are known by values that differ from each other, and have none.

    Args:
        blocks: float32 [N, blocks, block_size].
        whole: float32 [N, blocks], the scales that cover the whole range.
    """
    first = np.sort(blocks[0], -1)
    if not (first[:, 1:] == first[:, :-1]).any():
        return []
    values = np.sort(np.concatenate([blocks, np.zeros((*blocks.shape[:2], 1), np.float32)], -1), -1)
    gaps = np.diff(values)
    step = np.where(gaps > 0, gaps, np.inf).min(-1)
    shares = np.where(np.isfinite(step), step / whole, 1).astype(np.float32)
    return [shares / np.float32(part) for part in (1, 2, 3)]


def _search(blocks: np.ndarray, grid: Grid, shares: np.ndarray, weights: np.ndarray | None) -> Found:
    ends = range_of(blocks)
    best_error = np.full(blocks.shape[:2], np.inf, np.float32)
    best_shares = np.ones(blocks.shape[:2], np.float32)
    best_scales = np.zeros(blocks.shape[:2], np.float32)
    steps, moved, weighted = np.empty_like(blocks), np.empty_like(blocks), np.empty_like(blocks)
    whole, _ = cover(*ends, grid, 1.0)
    for share in (*_grid_shares(blocks, whole), *shares):
        candidate, zeros = cover(*ends, grid, share)
        round_steps(blocks, candidate, zeros, grid, steps)
        fitted = fit_scales(blocks, steps, _weigh(steps, weights, weighted), candidate)
        scales = storable_scales(fitted, grid)
        np.subtract(blocks, np.multiply(steps, scales[..., None], out=moved), out=moved)
        error = inner(moved, _weigh(moved, weights, weighted))
        better = error < best_error
        best_error[better] = error[better]
        best_scales[better] = scales[better]
        best_shares = np.where(better, share, best_shares)
    candidate, zeros = cover(*ends, grid, best_shares)
    codes = round_steps(blocks, candidate, zeros, grid, steps)
    codes += zeros[..., None]
    return codes.astype(np.uint8), best_scales, zeros.astype(np.uint8)


def _weigh(values: np.ndarray, weights: np.ndarray | None, out: np.ndarray) -> np.ndarray:
    """Return values times the weight of each input feature."""
    return values if weights is None else np.multiply(values, weights, out=out)
