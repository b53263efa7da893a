"""Quality against the baseline, one item of the data at a time.

An item (a window of text, a batch of lines) goes first through the baseline, whose answer is left in a
memory-mapped file, then through every other bundle, which sends back a few sums. No process ever holds
more than one answer, and no file of all logits is written.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llmfast import report
from llmfast.bench.contestant import Contestant, note_lacks
from llmfast.bench.processes import Processes
from llmfast.bench.statistics import decide, oriented, row_intervals
from llmfast.errors import ResourceError

# Per-unit figures go into the document up to here; beyond, they would swamp it.
MAX_UNIT_SAMPLES = 100


def measure_quality(
    name: str,
    metric: ModuleType,
    contestants: Sequence[Contestant],
    baseline: Contestant,
    items: Collection[Any],
    seed: int,
    processes: Processes,
    advance: Callable[..., None],
) -> int:
    """Measure a quality metric of all bundles, and file figures, spreads, changes and verdicts.

    Args:
        name: the metric's.
        metric: the plug-in.
        contestants: the bundles.
        baseline: the one the others are compared with.
        items: what the metric's `prepare` made of the data.
        seed: of the bootstrap.
        processes: opens them.
        advance: the progress bar; one step per item and bundle.

    Returns:
        Number of units measured.

    Raises:
        ResourceError: no room for the baseline's answer of one item.
    """
    alive = [one for one in contestants if one.failure is None]
    able = note_lacks(metric, name, alive)
    for one in alive:
        for key in metric.HIGHER_IS_BETTER:
            one.figures |= {key: None, f"{key}_spread": None}
    rows: dict[Contestant, np.ndarray] = {}
    for group in processes.groups(baseline):
        rows |= _compare_all(name, metric, [one for one in group if one in able], items, processes, advance)
        if processes.one_at_a_time:
            for one in group[1:]:
                one.stop()
    for one in able:
        if one in rows and one.failure is None:
            file_figures(one, metric, rows[one], rows[baseline], seed)
    return len(rows[baseline])


def retokenize(contestants: Sequence[Contestant], metrics: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    """Give bundles with another tokenizer than the baseline's the data in their own tokens.

    Args:
        contestants: the bundles.
        metrics: name -> plug-in of quality.
        items: name -> what the plug-in's `prepare` made of the data.
    """
    for one in contestants:
        if not one.same_tokens:
            able = (name for name in items if hasattr(metrics[name], "retokenize"))
            one.own_items = {name: metrics[name].retokenize(one.bundle, items[name]) for name in able}


def _compare_all(
    name: str,
    metric: ModuleType,
    order: Sequence[Contestant],
    items: Collection[Any],
    processes: Processes,
    advance: Callable[..., None],
) -> dict[Contestant, np.ndarray]:
    """Return each contestant's rows, float64 [units, fields]; the baseline is the first."""
    parts: dict[Contestant, list[np.ndarray]] = {one: [] for one in order}
    with _temporary_folder() as folder:
        reference = Path(folder) / "reference.npy"

        def compare(one: Contestant, item: Any) -> None:
            processes.start(one)
            parts[one].append(one.call("compare", name, item, reference, one is order[0]))

        for number, item in enumerate(items, start=1):
            for one in order:
                if one.failure is None:
                    advance(0, f"{name} {number} of {len(items)}: {one.label}")
                    own = one.own_items.get(name)
                    one.attempt(partial(compare, one, item if own is None else own[number - 1]))
                advance(1)
    finish = getattr(metric, "finish", lambda rows: rows)
    return {one: finish(np.concatenate(rows)) for one, rows in parts.items() if one.failure is None}


def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(prefix="llmfast-bench-")
    except OSError as error:
        raise ResourceError(f"no temporary directory: {error.strerror}", "set TMPDIR") from error


def file_figures(one: Contestant, metric: Any, rows: np.ndarray, theirs: np.ndarray, seed: int) -> None:
    """File a bundle's figures of quality, their intervals, changes against the baseline and verdicts.

    Args:
        one: the bundle.
        metric: has `figures`, `HIGHER_IS_BETTER` and `COMPARED` as a plug-in of quality has.
        rows: the bundle's, float64 [units, fields].
        theirs: the baseline's of the same units.
        seed: of the bootstrap.
    """
    compared = () if one.is_baseline else metric.COMPARED
    figures, reference = metric.figures(rows), metric.figures(theirs)
    # Drawn together: a unit that is hard is hard for both, and a difference of the two knows it.
    width = rows.shape[1]

    def with_changes(both: np.ndarray) -> dict[str, float | None]:
        ours: dict[str, float | None] = metric.figures(both[:, :width])
        base = metric.figures(both[:, width:]) if compared else {}
        return ours | {f"{key}_change": _minus(ours[key], base[key]) for key in compared}

    both = np.hstack([rows, theirs]) if compared else rows
    intervals = row_intervals(both, with_changes, seed)
    figures |= {f"{key}_change": _minus(figures[key], reference[key]) for key in compared}
    per_unit = [metric.figures(row[None]) for row in rows] if len(rows) <= MAX_UNIT_SAMPLES else []
    for key, figure in figures.items():
        if figure is not None and not math.isfinite(figure) and one.same_tokens:
            report.note(f"note: `{one.label}` has no {key}: it is not a finite number")
        one.figures[key] = _finite(figure)
        one.figures[f"{key}_spread"] = intervals[key]
        samples = [_finite(unit.get(key)) for unit in per_unit]
        if samples and None not in samples:
            one.samples[key] = [sample for sample in samples if sample is not None]
    for key in compared:
        sign = 1 if metric.HIGHER_IS_BETTER[key] else -1
        change, interval = one.figures[f"{key}_change"], one.figures[f"{key}_change_spread"]
        if change is not None:
            one.verdict[key] = decide(sign * change, oriented(interval, sign), 0.0, neutral=0.0)


def _minus(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def _finite(figure: float | None) -> float | None:
    return float(figure) if figure is not None and math.isfinite(figure) else None
