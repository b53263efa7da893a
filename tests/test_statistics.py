"""Medians, bootstrap intervals and ratios of llmfast.bench.statistics."""

from typing import Any

import numpy as np
import pytest

from llmfast.bench.statistics import (
    coverage,
    decide,
    launch_interval,
    median,
    median_interval,
    paired_ratios,
    relative_spread,
    row_intervals,
    safe_interval,
    simultaneous,
    unpaired_interval,
)


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


def _noisy(count: int, slower: float, seed: int, outliers: float = 0.1) -> list[float]:
    """Return ratios of two bundles on a shared machine: noise of 3 %, now and then a round that was disturbed."""
    random = np.random.default_rng(seed)
    times = np.exp(random.normal(0, 0.03, (2, count)))
    times *= 1 + (random.random((2, count)) < outliers) * random.exponential(0.5, (2, count))
    return list(times[0] / (times[1] * (1 + slower)))


def _verdicts(count: int, slower: float, seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        ratios = _noisy(count, slower, seed)
        found.append(decide(median(ratios), safe_interval(ratios, 0, simultaneous(8)), 0.02))
    return found


def test_a_bundle_against_itself_shows_no_difference() -> None:
    for count in (4, 8, 40):
        verdicts = _verdicts(count, 0.0, range(200))
        assert sum(verdict in ("equal", "inconclusive") for verdict in verdicts) >= 0.98 * 200


def test_a_delay_of_five_percent_is_found_in_sixty_rounds() -> None:
    assert _verdicts(60, 0.05, range(100)).count("worse") >= 95
    assert _verdicts(60, -0.05, range(100)).count("better") >= 95


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    hits = 0
    for seed in range(300):
        low, high = safe_interval(_noisy(30, 0.0, seed), 0)
        hits += low <= 1 <= high
    assert hits >= 0.92 * 300


def test_few_rounds_are_widened_to_students_t() -> None:
    logs = np.array([0.9, 1.0, 1.1])
    low, high = safe_interval(list(np.exp(logs)))
    reach = 4.303 * logs.std(ddof=1) / np.sqrt(3)  # the table's t for 95 %, two degrees of freedom
    assert (low, high) == pytest.approx((np.exp(1 - reach), np.exp(1 + reach)), rel=0.02)
    many = [2.0] * 10 + [3.0] * 10 + [90.0]  # coverage suffices: the outlier does not count
    assert coverage(len(many)) > 0.95
    assert safe_interval(many)[1] == 3.0
    assert safe_interval([1.0]) is None


def test_what_stays_with_a_process_widens_the_interval() -> None:
    random = np.random.default_rng(0)
    wrong = {"rounds": 0, "launches": 0}
    for _ in range(100):
        launches = np.repeat(np.arange(10), 4)
        ratios = list(np.exp(random.normal(0, 0.05, 10)[launches] + random.normal(0, 0.01, 40)))
        for key, interval in (
            ("rounds", safe_interval(ratios)),
            ("launches", launch_interval(ratios, list(launches))),
        ):
            wrong[key] += not interval[0] <= 1 <= interval[1]
    assert wrong["launches"] <= 7 < 20 <= wrong["rounds"]
    assert launch_interval([1.0, 1.1, 1.2], [0, 0, 1]) == safe_interval([1.0, 1.1, 1.2])


def test_unpaired_ratios_are_oriented() -> None:
    slow, fast = [2.0, 2.1, 1.9, 2.0], [1.0, 1.1, 0.9, 1.0]
    low, high = unpaired_interval(slow, fast, False, 0, 0.95)
    assert 0.4 < low <= 0.5 <= high < 0.6
    low, high = unpaired_interval(slow, fast, True, 0, 0.95)
    assert 1.7 < low <= 2 <= high < 2.4
    assert unpaired_interval([1.0], fast, True, 0, 0.95) is None


@pytest.mark.parametrize(
    ("estimate", "interval", "verdict"),
    [
        (1.2, (1.1, 1.3), "better"),
        (0.8, (0.7, 0.9), "worse"),
        (1.0, (0.99, 1.01), "equal"),
        (1.01, (1.001, 1.05), "inconclusive"),  # it is above 1, but not by what counts as a difference
        (1.1, (0.9, 1.3), "inconclusive"),
        (1.1, None, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_decisions(estimate: float | None, interval: Any, verdict: str) -> None:
    assert decide(estimate, interval, 0.02) == verdict
