"""Speed, measured in rounds in which every bundle takes its turn.

A shared machine drifts: bundles measured one after the other would be compared across its moods. Here
each runs once per round in its own process; the order rotates, so that none is always first. Ratios to the
baseline are formed within a round. Processes are started anew from time to time, since what one got when it
began (memory, cores, neighbours) stays with it and would pass for a difference. Rounds go on until the ratios
are known well enough, or time is up: what ends them is the width of the intervals, not what they show, which
would favour chance differences.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TypeVar

from llmfast.bench.contestant import Contestant, note_lacks
from llmfast.bench.options import BenchOptions
from llmfast.bench.statistics import (
    decide,
    launch_interval,
    median,
    median_interval,
    paired_ratios,
    relative_spread,
    simultaneous,
)
from llmfast.bench.subject import Trial
from llmfast.bench.workload import Workload, per_case

Item = TypeVar("Item")

# A launch is to be followed by this many times the rounds that it costs.
_LAUNCH_WORTH = 2

# Enough for any precision worth having, and an end for models so quick that time never runs out; --rounds may ask for
# more.
MOST_ROUNDS = 200


class Rounds:
    """The speed rounds of a run.

    Args:
        metrics: name -> speed metric.
        contestants: the bundles.
        baseline: the one the others are compared with.
        options: of the run.
        workload: what each turn consists of.
        turn: does something with a contestant, whose process is there meanwhile.
        always_fresh: processes begin anew in every turn anyway.
        launch_s: seconds that it took to open all bundles.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        metrics: Mapping[str, ModuleType],
        contestants: Sequence[Contestant],
        baseline: Contestant,
        options: BenchOptions,
        workload: Workload,
        turn: Callable[[Contestant, Callable[[], None]], None],
        always_fresh: bool = False,
        launch_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._always_fresh, self._launch_s = always_fresh, launch_s
        self._launches: list[int] = []  # of each round that counts
        self._metrics, self._contestants, self._baseline = metrics, contestants, baseline
        self._options, self._workload, self._turn, self._clock = options, workload, turn, clock
        self._able: dict[Contestant, list[str]] = {one: [] for one in contestants}

    def run(self, advance: Callable[..., None]) -> int:
        """Measure, and file figures, spreads, ratios and verdicts.

        Args:
            advance: the progress bar; one step per turn of the rounds that are run in any case.

        Returns:
            The number of rounds that count.
        """
        for name, metric in self._metrics.items():
            for one in note_lacks(metric, name, [one for one in self._contestants if one.failure is None]):
                self._able[one].append(name)
        vocab_size = min((one.vocab_size for one in self._contestants if one.vocab_size is not None), default=1)
        options, workload = self._options, self._workload
        counted = 0
        for number in self._numbers():
            is_warmup = number < options.warmup
            counted += not is_warmup
            if not is_warmup:
                self._launches.append(self._launches[-1] + self._launch_anew() if self._launches else 0)
            seed = (options.seed, number)
            trial = Trial(seed, vocab_size, workload.shapes, workload.output_tokens, options.price_per_hour)
            spelled = "warm-up" if is_warmup else f"round {counted}"
            for one in rotated([one for one in self._contestants if self._able[one]], number):
                if one.failure is None:
                    advance(0, f"{spelled}: {one.label}")
                    self._turn(one, partial(self._measure, one, trial, is_warmup))
                    advance(counted <= options.fewest_rounds)
        self._file()
        return counted

    def _numbers(self) -> Iterator[int]:
        """Yield the numbers of the rounds, warm-up first, as long as another one is worth its time."""
        if not any(self._able.values()):
            return
        options = self._options
        opened = self._clock()
        yield from range(options.warmup)
        start = self._launched = self._clock()
        self._launch_s += start - opened
        for done in range(max(MOST_ROUNDS, options.fewest_rounds)):
            if done >= options.fewest_rounds:
                spent = self._clock() - start
                if spent + spent / done > options.time_limit or self._is_precise():
                    return
            yield options.warmup + done

    def _launch_anew(self) -> bool:
        """End all processes, which the next turns start again, if those that run have been worth their start."""
        if self._always_fresh:
            return True
        now = self._clock()
        is_worth = self._options.time_limit > 0 and now - self._launched >= _LAUNCH_WORTH * self._launch_s
        if is_worth:
            self._launched = now
            for one in self._contestants:
                one.stop()
        return is_worth

    def _measure(self, one: Contestant, trial: Trial, is_warmup: bool) -> None:
        if one.is_fresh and not is_warmup and (self._always_fresh or self._launches[-1]):
            one.call("measure", self._able[one], trial)
        figures, latencies = one.call("measure", self._able[one], trial)
        one.is_fresh = False
        if is_warmup:
            return
        for key, figure in figures.items():
            one.samples.setdefault(key, []).append(figure)
        for key, seconds in latencies.items():
            one.latencies.setdefault(key, []).extend(seconds)

    def _is_precise(self) -> bool:
        """Return whether every ratio of the table, or without candidates every speed, is known to the precision."""
        candidates = [one for one in self._contestants if not one.is_baseline and one.failure is None]
        for key, higher_is_better in self._keys(headline=True):
            if not candidates and self._baseline.samples.get(key):
                samples = self._baseline.samples[key]
                if relative_spread(median(samples), median_interval(samples)) > self._options.precision:
                    return False
            for ratios in (self._ratios(one, key, higher_is_better) for one in candidates):
                interval = launch_interval(ratios, self._launches, 0, self._confidence) if ratios else None
                if ratios and relative_spread(median(ratios), interval) > self._options.precision:
                    return False
        return True

    @property
    def _confidence(self) -> float:
        """Of one interval, so that all verdicts on a candidate hold together."""
        return simultaneous(sum(1 for _ in self._keys()))

    def _keys(self, headline: bool = False) -> Iterator[tuple[str, bool]]:
        """Yield every measured figure's key and whether higher is better; `headline` ones have a ratio in the table."""
        for metric in self._metrics.values():
            shown = {column.key for column in metric.COLUMNS}
            for template, higher_is_better in metric.HIGHER_IS_BETTER.items():
                if headline and f"{template}_ratio" not in shown:
                    continue
                for key in per_case(template, self._workload.shapes):
                    if any(key in one.samples for one in self._contestants):
                        yield key, higher_is_better

    def _ratios(self, one: Contestant, key: str, higher_is_better: bool) -> list[float]:
        ours, theirs = one.samples.get(key, []), self._baseline.samples.get(key, [])
        comparable = len(ours) == len(theirs) == len(self._launches) > 0 and min(*ours, *theirs) > 0
        return paired_ratios(ours, theirs, higher_is_better) if comparable else []

    def _file(self) -> None:
        """Turn samples into `<key>`, `<key>_spread`, `<key>_ratio`, `<key>_ratio_spread` and verdicts."""
        seed, confidence = self._options.seed, self._confidence
        for key, higher_is_better in list(self._keys()):
            for one in self._contestants:
                if one.failure is not None:
                    continue
                samples, ratios = one.samples.get(key), self._ratios(one, key, higher_is_better)
                one.figures |= {
                    key: median(samples) if samples else None,
                    f"{key}_spread": median_interval(samples, seed) if samples else None,
                    f"{key}_ratio": median(ratios) if ratios else None,
                    f"{key}_ratio_spread": launch_interval(ratios, self._launches, seed) if ratios else None,
                }
                if ratios and not one.is_baseline:
                    interval = launch_interval(ratios, self._launches, seed, confidence)
                    one.verdict[key] = decide(median(ratios), interval, self._options.precision)


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """Return the items in turn order, starting `by` places further on."""
    if not items:
        return []
    start = by % len(items)
    return [*items[start:], *items[:start]]
