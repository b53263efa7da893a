"""Medians, bootstrap intervals, paired ratios and verdicts: what a few noisy rounds can honestly say."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95

Interval = tuple[float, float]
Figures = Mapping[str, float | None]


def median(samples: Sequence[float]) -> float:
    """Return the median of at least one sample."""
    return float(np.median(samples))


def median_interval(samples: Sequence[float], seed: int = 0, confidence: float = CONFIDENCE) -> Interval | None:
    """Return the bootstrap interval of the median, of 95 % unless said otherwise.

    The percentile bootstrap: the samples are drawn again with replacement `RESAMPLES` times. Fewer
    than two samples say nothing about spread: None. Few samples can't promise 95 %: see `coverage`.

    Args:
        samples: one figure per round.
        seed: of the draws; the same samples and seed give the same interval.
        confidence: share of such intervals that hold the true median.
    """
    if len(samples) < 2:
        return None
    return _percentiles(_resampled_medians(samples, seed), confidence)


def launch_interval(
    ratios: Sequence[float], launches: Sequence[int], seed: int = 0, confidence: float = CONFIDENCE
) -> Interval | None:
    """Return an interval of the median of ratios that were measured in several launches of the processes.

    What a process got when it began (memory, cores, neighbours) stays with it: the ratios of one launch err alike, and
    no number of them shows it. The interval is widened to that of the launches' medians, where there are three: of
    95 %, since what stays with a process moves all its figures alike, however many are looked at.

    Args:
        ratios: one a round.
        launches: the launch that each was measured in.
        seed: of the bootstrap.
        confidence: of the interval over single rounds.
    """
    interval = safe_interval(ratios, seed, confidence)
    medians = [median([one for one, own in zip(ratios, launches, strict=True) if own == number])
               for number in dict.fromkeys(launches)]  # fmt: skip
    if interval is None or not 3 <= len(medians) < len(ratios):
        return interval
    between = safe_interval(medians, seed)
    assert between is not None
    return min(interval[0], between[0]), max(interval[1], between[1])


def safe_interval(ratios: Sequence[float], seed: int = 0, confidence: float = CONFIDENCE) -> Interval | None:
    """Return an interval of the median of some ratios that keeps its promise for few of them, and for skewed ones.

    The bootstrap promises too much there. It is widened to the order statistics between which the median lies with
    the confidence asked for, whatever the distribution; and where the range of the samples itself can't vouch for it
    (see `coverage`), to Student's t interval of the logarithms.
    """
    interval = median_interval(ratios, seed, confidence)
    if interval is None or min(ratios) <= 0:
        return interval
    count = len(ratios)
    if coverage(count) >= confidence:
        ordered, left_out = sorted(ratios), _left_out(count, confidence)
        low, high = ordered[left_out], ordered[-1 - left_out]
    else:
        logs = np.log(ratios)
        reach = _student_t(count - 1, confidence) * float(logs.std(ddof=1)) / math.sqrt(count)
        low, high = math.exp(float(logs.mean()) - reach), math.exp(float(logs.mean()) + reach)
    return min(interval[0], low), max(interval[1], high)


@cache
def _left_out(count: int, confidence: float) -> int:
    """Return how many of the lowest, and of the highest, samples an interval of the median may leave out.

    The median lies below the k-th lowest of n samples with probability P(Binomial(n, 1/2) < k).
    """
    left_out, tail = 0, 0.0
    while True:
        tail += math.comb(count, left_out) / 2.0**count
        if 2 * tail > 1 - confidence:
            return max(0, left_out - 1)
        left_out += 1


def decide(estimate: float | None, interval: Interval | None, margin: float, neutral: float = 1.0) -> str:
    """Return what an estimate and its interval show: `better`, `worse`, `equal` or `inconclusive`.

    Args:
        estimate: an improvement, a ratio or a difference, oriented so that more is better.
        interval: around it; None shows nothing.
        margin: differences smaller than this count as none: an interval within it means `equal`, and no verdict
            of a difference is given on an estimate within it.
        neutral: the value of no difference, 1 for ratios, 0 for differences.
    """
    if estimate is None or interval is None:
        return "inconclusive"
    low, high = interval
    if neutral - margin <= low and high <= neutral + margin:
        return "equal"
    if low > neutral and estimate > neutral + margin:
        return "better"
    return "worse" if high < neutral and estimate < neutral - margin else "inconclusive"


def oriented(interval: Interval | None, sign: int) -> Interval | None:
    """Return an interval of differences so that more is better: turned round where `sign` is -1."""
    if interval is None or sign > 0:
        return interval
    return -interval[1], -interval[0]


def simultaneous(comparisons: int) -> float:
    """Return the confidence of each of several intervals that together err in 5 % of all runs (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, comparisons)


def unpaired_interval(
    candidate: Sequence[float], baseline: Sequence[float], higher_is_better: bool, seed: int, confidence: float
) -> Interval | None:
    """Return the bootstrap interval of the ratio of two medians whose samples are not of the same rounds."""
    if min(len(candidate), len(baseline)) < 2:
        return None
    ours, theirs = _resampled_medians(candidate, seed), _resampled_medians(baseline, seed + 1)
    return _percentiles(ours / theirs if higher_is_better else theirs / ours, confidence)


def _resampled_medians(samples: Sequence[float], seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).integers(len(samples), size=(RESAMPLES, len(samples)))
    medians: np.ndarray = np.median(np.asarray(samples, np.float64)[draws], axis=1)
    return medians


@cache
def _student_t(degrees: int, confidence: float) -> float:
    """Return the two-sided quantile of Student's t, from draws: within 2 % down to two degrees of freedom."""
    draws = np.abs(np.random.default_rng(0).standard_t(degrees, 400_000))
    return float(np.quantile(draws, confidence))


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


def _percentiles(values: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    tail = (1 - confidence) / 2
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
