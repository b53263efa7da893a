"""Medians, bootstrap intervals and ratios of llmfast.bench.statistics."""

import numpy as np
import pytest

from llmfast.bench.statistics import coverage, median, median_interval, paired_ratios, relative_spread, row_intervals


def test_median_of_odd_and_even_counts() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_interval_needs_two_samples() -> None:
    assert median_interval([1.0]) is None
    assert median_interval([1.0, 1.0]) == (1.0, 1.0)


def test_interval_is_reproducible_and_holds_the_median() -> None:
    samples = list(np.random.default_rng(3).normal(10, 1, 9))
    low, high = median_interval(samples, seed=1)
    assert (low, high) == median_interval(samples, seed=1)
    assert min(samples) <= low <= median(samples) <= high <= max(samples)
    assert low < high


def test_interval_covers_the_true_median() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        low, high = median_interval(list(random.lognormal(0, 0.3, 25)), seed=trial)
        covered += low <= 1.0 <= high
    assert covered >= 88


def test_few_samples_cover_less() -> None:
    random = np.random.default_rng(0)
    ranges = random.normal(0, 1, (4000, 3))
    covered = (ranges.min(axis=1) <= 0) & (ranges.max(axis=1) >= 0)
    assert coverage(3) == 0.75 == pytest.approx(covered.mean(), abs=0.03)
    assert coverage(5) == 0.9375


def test_ratios_above_one_are_better() -> None:
    assert paired_ratios([20.0, 30.0], [10.0, 10.0], higher_is_better=True) == [2.0, 3.0]
    assert paired_ratios([0.5, 2.0], [1.0, 1.0], higher_is_better=False) == [2.0, 0.5]


def test_ratios_need_rounds_of_both() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([1.0], [1.0, 2.0], higher_is_better=True)


def test_ratio_pairs_cancel_the_drift_of_the_machine() -> None:
    drift = np.linspace(1, 3, 7)
    ratios = paired_ratios(list(20 * drift), list(10 * drift), higher_is_better=True)
    assert median_interval(ratios) == pytest.approx((2.0, 2.0))


def test_row_intervals_match_a_mean() -> None:
    rows = np.random.default_rng(1).normal(5, 1, (400, 1))
    interval = row_intervals(rows, lambda drawn: {"mean": float(drawn.mean())})["mean"]
    expected = 1.96 * rows.std() / np.sqrt(len(rows))
    assert interval[0] == pytest.approx(rows.mean() - expected, abs=0.03)
    assert interval[1] == pytest.approx(rows.mean() + expected, abs=0.03)


def test_row_intervals_of_what_cannot_be_drawn_are_none() -> None:
    def figures(rows: np.ndarray) -> dict[str, float | None]:
        return {"mean": float(rows.mean()), "absent": None, "nan": float("nan")}

    assert row_intervals(np.zeros((1, 1)), figures) == {"mean": None, "absent": None, "nan": None}
    assert row_intervals(np.zeros((4, 1)), figures) == {"mean": (0.0, 0.0), "absent": None, "nan": None}


def test_relative_spread_is_half_the_width() -> None:
    assert relative_spread(10.0, (9.0, 11.0)) == pytest.approx(0.1)
    assert relative_spread(10.0, None) == 0.0
    assert relative_spread(None, None) == 0.0
