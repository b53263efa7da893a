"""Scales and zero points of blocks, chosen for the least squared error.

For each block: w ~ (clip(round(w / s) + z) - z) * s, over a line of candidate ranges; the best one's
scale is then the least-squares fit to its codes. Errors may be weighted per input feature.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.packed import Grid, storable_scales, to_blocks
from llmfast.runtime import usable_cores

# Rows are searched in groups that stay in a core's cache.
_GROUP_ELEMENTS = 1 << 16
_SMALLEST_SCALE = np.float32(1e-30)
# Of a block of zeros: float16 holds it, and what a kernel loses to cancellation times it is nothing.
_ZERO_SCALE = np.float32(2.0**-14)

_MOST_STEPS = 1000
Found = tuple[np.ndarray, np.ndarray, np.ndarray]


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
    blocks = to_blocks(weight, grid)
    weights = None if importance is None else to_blocks(importance[None], grid)[0]
    rows = max(1, _GROUP_ELEMENTS // blocks[0].size)
    groups = [blocks[start : start + rows] for start in range(0, len(blocks), rows)]
    shares = np.linspace(1.0, floor, steps, dtype=np.float32)
    pool = ThreadPoolExecutor(usable_cores())  # NumPy releases the interpreter lock
    try:
        parts = list(pool.map(lambda group: _search(group, grid, shares, weights), groups))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the groups at hand, not for all of them
    codes, scales, zero_points = (np.concatenate(part) for part in zip(*parts, strict=True))
    return codes, scales, zero_points


def _search(blocks: np.ndarray, grid: Grid, shares: np.ndarray, weights: np.ndarray | None) -> Found:
    blocks = np.ascontiguousarray(blocks, np.float32)
    ends = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    best_error = np.full(blocks.shape[:2], np.inf, np.float32)
    best_shares = np.ones(blocks.shape[:2], np.float32)
    best_scales = np.zeros(blocks.shape[:2], np.float32)
    steps, moved, weighted = np.empty_like(blocks), np.empty_like(blocks), np.empty_like(blocks)
    for share in shares:
        candidate, zeros = _candidate(*ends, grid, share)
        _round(blocks, candidate, zeros, grid, steps)
        scales = storable_scales(_fit(blocks, steps, candidate, weights, weighted), grid)
        np.subtract(blocks, np.multiply(steps, scales[..., None], out=moved), out=moved)
        error = _inner(moved, moved if weights is None else np.multiply(moved, weights, out=weighted))
        better = error < best_error
        best_error[better] = error[better]
        best_scales[better] = scales[better]
        best_shares[better] = share
    candidate, zeros = _candidate(*ends, grid, best_shares)
    codes = _round(blocks, candidate, zeros, grid, steps)
    codes += zeros[..., None]
    return codes.astype(np.uint8), best_scales, zeros.astype(np.uint8)


def _candidate(low: np.ndarray, high: np.ndarray, grid: Grid, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and zero points that cover a share of each block's range."""
    if grid.symmetric:
        scales = _positive(np.maximum(-low, high) * share / np.float32(grid.middle - 1))
        return scales, np.full(scales.shape, grid.middle, np.float32)
    low, high = low * share, high * share
    scales = _positive((high - low) / np.float32(grid.largest))
    return scales, np.clip(np.rint(-low / scales), 0, grid.largest)


def _positive(scales: np.ndarray) -> np.ndarray:
    """Return scales that can be divided by."""
    return np.where(scales > _SMALLEST_SCALE, scales, _ZERO_SCALE)


def _round(blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray, grid: Grid, out: np.ndarray) -> np.ndarray:
    """Return codes less their zero points."""
    np.rint(np.divide(blocks, scales[..., None], out=out), out=out)
    return np.clip(out, -zeros[..., None], (grid.largest - zeros)[..., None], out=out)


def _fit(
    blocks: np.ndarray, steps: np.ndarray, scales: np.ndarray, weights: np.ndarray | None, weighted: np.ndarray
) -> np.ndarray:
    """Return the scales with the least squared error for given steps: <w, q> / <q, q>."""
    if weights is None:
        weighted = steps
    else:
        np.multiply(steps, weights, out=weighted)
    power, fitted = _inner(weighted, steps), _inner(blocks, weighted)
    fitted /= np.where(power > 0, power, 1)
    return np.where((power > 0) & (fitted > 0), fitted, scales)


def _inner(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the inner products over the last axis."""
    products: np.ndarray = np.einsum("nbk,nbk->nb", left, right)
    return products
