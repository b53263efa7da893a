"""Medians, bootstrap intervals and paired ratios: what a few noisy rounds can honestly say."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95

Interval = tuple[float, float]
Figures = Mapping[str, float | None]


def median(samples: Sequence[float]) -> float:
    """Return the median of at least one sample."""
    return float(np.median(samples))


def median_interval(samples: Sequence[float], seed: int = 0) -> Interval | None:
    """Return the 95 % bootstrap interval of the median.

    The percentile bootstrap: the samples are drawn again with replacement `RESAMPLES` times. Fewer
    than two samples say nothing about spread: None. Few samples can't promise 95 %: see `coverage`.

    Args:
        samples: one figure per round.
        seed: of the draws; the same samples and seed give the same interval.
    """
    if len(samples) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(samples), size=(RESAMPLES, len(samples)))
    return _percentiles(np.median(np.asarray(samples, np.float64)[draws], axis=1))


def coverage(count: int) -> float:
    """Return the share of cases in which the range of some samples holds the true median.

    No interval of theirs is wider than the range, and the median lies outside it when all samples fall
    on one side: 5 samples reach 94 %, 3 only 75 %.
    """
    return float(1 - 2.0 ** (1 - count))


def paired_ratios(candidate: Sequence[float], baseline: Sequence[float], higher_is_better: bool) -> list[float]:
    """Return the improvement over the baseline, round by round: above 1 is better.

    Figures of the same round saw the same state of a shared machine, so that its drift cancels.
    """
    pairs = zip(candidate, baseline, strict=True)
    return [ours / theirs if higher_is_better else theirs / ours for ours, theirs in pairs]


def row_intervals(
    rows: np.ndarray, figures: Callable[[np.ndarray], Figures], seed: int = 0, resamples: int = RESAMPLES // 4
) -> dict[str, Interval | None]:
    """Return the 95 % bootstrap interval of every figure that is a function of all rows.

    Args:
        rows: float64 [units, fields]; a unit (a window of text, a pair, an example) is what is drawn.
        figures: rows -> name -> figure.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        Name -> interval; None where there is one unit only, or a draw has no such figure.
    """
    names = list(figures(rows))
    if len(rows) < 2:
        return dict.fromkeys(names)
    random = np.random.default_rng(seed)
    drawn = [figures(rows[random.integers(len(rows), size=len(rows))]) for _ in range(resamples)]
    intervals: dict[str, Interval | None] = {}
    for name in names:
        values = [figure for draw in drawn if (figure := draw[name]) is not None and math.isfinite(figure)]
        intervals[name] = _percentiles(np.array(values)) if len(values) == resamples else None
    return intervals


def relative_spread(value: float | None, interval: Interval | None) -> float:
    """Return half the interval's width as a share of the value; 0 when there is no interval."""
    if interval is None or not value:
        return 0.0
    return (interval[1] - interval[0]) / 2 / abs(value)


def _percentiles(values: np.ndarray) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def spearman(left: np.ndarray, right: np.ndarray) -> float | None:
    """Return the rank correlation, None when one side does not vary or holds NaN."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    left, right = _ranks(left), _ranks(right)
    if left.std() == 0 or right.std() == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    ranks: np.ndarray = (first + (counts - 1) / 2)[places]
    return ranks
