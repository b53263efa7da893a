"""Arithmetic of blocks on a grid: ranges, codes and scales, for all blocks of some rows at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llmfast.graph.packed import Grid
from llmfast.runtime import usable_cores

# Rows are worked on in groups that stay in a core's cache.
_GROUP_ELEMENTS = 1 << 16
_SMALLEST_SCALE = np.float32(1e-30)
# Of a block of zeros: float16 holds it, and what a kernel loses to cancellation times it is nothing.
_ZERO_SCALE = np.float32(2.0**-14)

Found = tuple[np.ndarray, np.ndarray, np.ndarray]


def by_rows(blocks: np.ndarray, find: Callable[[np.ndarray], Found]) -> Found:
    """Find codes, scales and zero points of all blocks, on all cores.

    Args:
        blocks: float32 [N, blocks, block_size].
        find: returns those of some of the rows, which it gets contiguous.

    Returns:
        codes uint8 [N, blocks, block_size], scales float32 [N, blocks], zero points uint8 [N, blocks].
    """
    rows = max(1, _GROUP_ELEMENTS // blocks[0].size)
    groups = [blocks[start : start + rows] for start in range(0, len(blocks), rows)]
    pool = ThreadPoolExecutor(usable_cores())  # NumPy releases the interpreter lock
    try:
        parts = list(pool.map(lambda group: find(np.ascontiguousarray(group, np.float32)), groups))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the groups at hand, not for all of them
    codes, scales, zero_points = (np.concatenate(part) for part in zip(*parts, strict=True))
    return codes, scales, zero_points


def range_of(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of each block's range, which has zero in it, float32 [N, blocks]."""
    return np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)


def cover(low: np.ndarray, high: np.ndarray, grid: Grid, share: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and zero points, float32 [N, blocks], that cover a share of each block's range."""
    if grid.symmetric:
        scales = _positive(np.maximum(-low, high) * share / np.float32(grid.middle - 1))
        return scales, np.full(scales.shape, grid.middle, np.float32)
    low, high = low * share, high * share
    scales = _positive((high - low) / np.float32(grid.largest))
    return scales, np.clip(np.rint(-low / scales), 0, grid.largest)


def _positive(scales: np.ndarray) -> np.ndarray:
    """Return scales that can be divided by."""
    return np.where(scales > _SMALLEST_SCALE, scales, _ZERO_SCALE)


def round_steps(blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray, grid: Grid, out: np.ndarray) -> np.ndarray:
    """Return codes less their zero points."""
    np.rint(np.divide(blocks, scales[..., None], out=out), out=out)
    return np.clip(out, -zeros[..., None], (grid.largest - zeros)[..., None], out=out)


def fit_scales(blocks: np.ndarray, steps: np.ndarray, weighted: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the scales with the least squared error for given steps: <w, q> / <q, q>.

    Args:
        blocks: float32 [N, blocks, block_size].
        steps: codes less their zero points, of the same shape.
        weighted: `steps` times the weight of each error.
        scales: where nothing fits, of a block of zeros for instance.
    """
    power, fitted = inner(weighted, steps), inner(blocks, weighted)
    fitted /= np.where(power > 0, power, 1)
    return np.where((power > 0) & (fitted > 0), fitted, scales)


def inner(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the inner products over the last axis."""
    products: np.ndarray = np.einsum("nbk,nbk->nb", left, right)
    return products
