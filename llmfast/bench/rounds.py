"""Speed, measured in rounds in which every bundle takes its turn.

A shared machine drifts: bundles measured one after the other would be compared across its moods. Here
all are open at once, each in its own process, and each runs once per round; the order rotates, so that
none is always first. Ratios to the baseline are formed within a round.
"""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TypeVar

from llmfast.bench.contestant import Contestant, note_lacks
from llmfast.bench.options import BenchOptions, per_shape
from llmfast.bench.statistics import median, median_interval, paired_ratios
from llmfast.bench.subject import Trial

Item = TypeVar("Item")


def run_rounds(
    metrics: Mapping[str, ModuleType],
    contestants: Sequence[Contestant],
    baseline: Contestant,
    options: BenchOptions,
    advance: Callable[..., None],
) -> None:
    """Measure the speed metrics in interleaved rounds, and file figures, spreads and ratios.

    Args:
        metrics: name -> speed metric.
        contestants: the bundles, started.
        baseline: the one the others are compared with.
        options: of the run.
        advance: the progress bar; one step per turn.
    """
    able: dict[Contestant, list[str]] = {one: [] for one in contestants}
    for name, metric in metrics.items():
        for one in note_lacks(metric, name, contestants):
            able[one].append(name)
    vocab_size = min((one.vocab_size for one in contestants if one.vocab_size is not None), default=1)
    players = [one for one in contestants if able[one]]
    for number in range(options.warmup + options.rounds):
        is_warmup = number < options.warmup
        seed = (options.seed, number)
        trial = Trial(seed, vocab_size, options.prompt_tokens, options.output_tokens, options.shape_sizes)
        turn = "warm-up" if is_warmup else f"round {number - options.warmup + 1} of {options.rounds}"
        for one in rotated(players, number):
            advance(0, f"{turn}: {one.label}")
            figures = one.call("measure", able[one], trial)
            advance(1)
            if not is_warmup:
                for key, figure in figures.items():
                    one.samples.setdefault(key, []).append(figure)
    for metric in metrics.values():
        for template, higher_is_better in metric.HIGHER_IS_BETTER.items():
            for key in per_shape(template, options.shape_sizes):
                for one in contestants:
                    file_figure(one, baseline, key, higher_is_better, options.seed)


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """Return the items in turn order, starting `by` places further on."""
    if not items:
        return []
    start = by % len(items)
    return [*items[start:], *items[:start]]


def file_figure(one: Contestant, baseline: Contestant, key: str, higher_is_better: bool, seed: int) -> None:
    """Turn a key's samples into `<key>`, `<key>_spread`, `<key>_ratio` and `<key>_ratio_spread`."""
    samples = one.samples.get(key)
    theirs = baseline.samples.get(key)
    ratios = paired_ratios(samples, theirs, higher_is_better) if samples and theirs else None
    one.figures[key] = median(samples) if samples else None
    one.figures[f"{key}_spread"] = median_interval(samples, seed) if samples else None
    one.figures[f"{key}_ratio"] = median(ratios) if ratios else None
    one.figures[f"{key}_ratio_spread"] = median_interval(ratios, seed) if ratios else None
