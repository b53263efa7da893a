"""The range of activations that a static scale covers: what lies outside is clipped."""

from collections.abc import Iterable

import numpy as np

RANGES = ("minmax", "percentile", "entropy")

_BINS = 2048
_LEVELS = 128  # steps of eight bits on one side of zero
_CANDIDATES = 64
_PERCENTILE = 0.9999


def find_range(samples: Iterable[np.ndarray], method: str) -> tuple[float, float]:
    """Return the ends of a range that holds zero.

    minmax covers everything that was seen; percentile all magnitudes but one in ten thousand; entropy clips where the
    distribution of magnitudes loses the least information to its 128 steps (Migacz 2017, "8-bit inference with
    TensorRT").

    Args:
        samples: float32 arrays of any shape, gone through several times.
        method: one of `RANGES`.
    """
    ends = [(float(sample.min()), float(sample.max())) for sample in samples]
    low, high = min(0.0, *(end for end, _ in ends)), max(0.0, *(end for _, end in ends))
    largest = max(-low, high)
    if method == "minmax" or largest == 0:
        return low, high
    counts = np.zeros(_BINS, np.int64)
    for sample in samples:
        counts += np.histogram(np.abs(sample), _BINS, (0, largest))[0]
    bins = _percentile_bins(counts) if method == "percentile" else _entropy_bins(counts)
    limit = largest * bins / _BINS
    return max(low, -limit), min(high, limit)


def _percentile_bins(counts: np.ndarray) -> int:
    return int(np.searchsorted(np.cumsum(counts), _PERCENTILE * counts.sum())) + 1


def _entropy_bins(counts: np.ndarray) -> int:
    """Return how many bins to keep for the least Kullback-Leibler divergence."""
    candidates = np.unique(np.linspace(_LEVELS, len(counts), _CANDIDATES, dtype=int))
    divergences = [_divergence(counts, int(bins)) for bins in candidates]
    return int(candidates[int(np.argmin(divergences))])


def _divergence(counts: np.ndarray, bins: int) -> float:
    clipped = counts[:bins].astype(np.float64)
    clipped[-1] += counts[bins:].sum()
    level = np.arange(bins) * _LEVELS // bins
    used = counts[:bins] > 0
    mass = np.bincount(level, counts[:bins], _LEVELS)
    occupied = np.bincount(level, used, _LEVELS)
    coarse = np.where(used, (mass / np.maximum(occupied, 1))[level], 0)
    exact, approximate = clipped / clipped.sum(), coarse / max(coarse.sum(), 1)
    both = (exact > 0) & (approximate > 0)
    lost = exact[(exact > 0) & ~both].sum()  # outliers piled on an empty bin
    return float((exact[both] * np.log(exact[both] / approximate[both])).sum() + lost * np.log(1 / 1e-9))
