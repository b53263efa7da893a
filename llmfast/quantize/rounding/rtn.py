"""Round to nearest, with the scale of each block chosen for the least squared error of the weight.

Cost: `search_steps` passes over the weight; memory: one row group at a time.
Choose it when there is no calibration text, or as the baseline that other methods must beat.
"""

from dataclasses import dataclass

import numpy as np

from llmfast.graph.packed import Grid, QuantizedWeight
from llmfast.quantize.rounding._search import check_search, search_blocks

NEEDS_STATISTICS = False


@dataclass(frozen=True)
class Options:
    """Options of round-to-nearest.

    Attributes:
        search_steps: candidate ranges per block; 1 takes the whole range and rounds.
        search_floor: the smallest candidate, as a share of the block's range.
    """

    search_steps: int = 12
    search_floor: float = 0.7

    def __post_init__(self) -> None:
        check_search(self.search_steps, self.search_floor)


def quantize_weight(weight: np.ndarray, grid: Grid, options: Options) -> QuantizedWeight:
    """Quantize a weight, float32 [N, K]."""
    codes, scales, zero_points = search_blocks(weight, grid, options.search_steps, options.search_floor, None)
    return QuantizedWeight(codes, scales, None if grid.symmetric else zero_points, grid, weight.shape[1])
