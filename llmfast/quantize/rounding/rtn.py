"""Round to nearest, with the scale of each block chosen for the least squared error.

For each block: w ~ (clip(round(w / s) + z) - z) * s, over a line of candidate ranges; the best one's
scale is then the least-squares fit to its codes.
Cost: `search_steps` passes over the weight; memory: one row group at a time.
Choose it when there is no calibration text, or as the baseline that other methods must beat.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from llmfast.graph.packed import Grid, QuantizedWeight, to_blocks
from llmfast.runtime import usable_cores

# Rows are searched in groups that stay in a core's cache.
_GROUP_ELEMENTS = 1 << 16
_SMALLEST_SCALE = np.float32(1e-30)


@dataclass(frozen=True)
class Options:
    """Options of round-to-nearest.

    Attributes:
        search_steps: candidate ranges per block; 1 takes the whole range and rounds.
        search_floor: the smallest candidate, as a share of the block's range.
    """

    search_steps: int = 12
    search_floor: float = 0.7


def quantize_weight(weight: np.ndarray, grid: Grid, options: Options) -> QuantizedWeight:
    """Quantize a weight.

    Args:
        weight: float32 [N, K].
        grid: the values it may take.
        options: see `Options`.
    """
    blocks = to_blocks(weight, grid)
    rows = max(1, _GROUP_ELEMENTS // blocks[0].size)
    groups = [blocks[start : start + rows] for start in range(0, len(blocks), rows)]
    with ThreadPoolExecutor(usable_cores()) as pool:  # NumPy releases the interpreter lock
        parts = list(pool.map(lambda group: _search(group, grid, options), groups))
    codes, scales, zero_points = (np.concatenate(part) for part in zip(*parts, strict=True))
    return QuantizedWeight(codes, scales, None if grid.symmetric else zero_points, grid, weight.shape[1])


def _search(blocks: np.ndarray, grid: Grid, options: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = np.ascontiguousarray(blocks, np.float32)
    best_error = np.full(blocks.shape[:2], np.inf, np.float32)
    best_codes = np.zeros(blocks.shape, np.uint8)
    best_scales = np.zeros(blocks.shape[:2], np.float32)
    best_zeros = np.zeros(blocks.shape[:2], np.uint8)
    for share in np.linspace(1.0, options.search_floor, options.search_steps, dtype=np.float32):
        for scales, zeros in _candidates(blocks, grid, share):
            steps = np.rint(blocks / scales[..., None])
            np.clip(steps, -zeros[..., None], (grid.largest - zeros)[..., None], out=steps)
            scales = _fit(blocks, steps, scales)
            error = np.square(blocks - steps * scales[..., None]).sum(-1)
            better = error < best_error
            best_error[better] = error[better]
            best_scales[better] = scales[better]
            best_zeros[better] = zeros[better].astype(np.uint8)
            best_codes[better] = (steps[better] + zeros[better][:, None]).astype(np.uint8)
    return best_codes, best_scales, best_zeros


def _candidates(blocks: np.ndarray, grid: Grid, share: np.float32) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return scales and zero points that cover a share of each block's range."""
    if grid.symmetric:
        magnitude = np.abs(blocks).max(-1) * share
        scales = np.maximum(magnitude / np.float32(grid.middle - 1), _SMALLEST_SCALE)
        return [(scales, np.full(scales.shape, grid.middle, np.float32))]
    low = np.minimum(blocks.min(-1), 0) * share
    high = np.maximum(blocks.max(-1), 0) * share
    scales = np.maximum((high - low) / np.float32(grid.largest), _SMALLEST_SCALE)
    return [(scales, np.clip(np.rint(-low / scales), 0, grid.largest))]


def _fit(blocks: np.ndarray, steps: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the scales with the least squared error for given steps: <w, q> / <q, q>."""
    power = np.square(steps).sum(-1)
    fitted = (blocks * steps).sum(-1) / np.maximum(power, 1)
    return np.where((power > 0) & (fitted > 0), fitted, scales).astype(np.float32)
