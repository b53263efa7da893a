"""Quality against the baseline, one item of the data at a time.

An item (a window of text, a batch of lines) goes first through the baseline, whose answer is left in a
memory-mapped file, then through every other bundle, which sends back a few sums. No process ever holds
more than one answer, and no file of all logits is written.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llmfast import report
from llmfast.bench.contestant import Contestant, note_lacks
from llmfast.bench.statistics import row_intervals
from llmfast.errors import ResourceError

# Per-unit figures go into the document up to here; beyond, they would swamp it.
MAX_UNIT_SAMPLES = 100


def measure_quality(
    name: str,
    metric: ModuleType,
    contestants: Sequence[Contestant],
    baseline: Contestant,
    items: Sequence[Any],
    seed: int,
    advance: Callable[..., None],
) -> int:
    """Measure a quality metric of all bundles, and file figures and spreads.

    Args:
        name: the metric's.
        metric: the plug-in.
        contestants: the bundles, started.
        baseline: the one the others are compared with.
        items: what the metric's `prepare` made of the data.
        seed: of the bootstrap.
        advance: the progress bar; one step per item and bundle.

    Returns:
        Number of units measured.

    Raises:
        ResourceError: no room for the baseline's answer of one item.
    """
    able = note_lacks(metric, name, contestants)
    units = 0
    for one in contestants:
        for key in metric.HIGHER_IS_BETTER:
            one.figures |= {key: None, f"{key}_spread": None}
    for one, rows in _compare_all(name, able, baseline, items, advance).items():
        units = len(rows)
        _file_figures(one, metric, rows, seed)
    return units


def _compare_all(
    name: str,
    contestants: Sequence[Contestant],
    baseline: Contestant,
    items: Sequence[Any],
    advance: Callable[..., None],
) -> dict[Contestant, np.ndarray]:
    """Return each contestant's rows, float64 [units, fields]."""
    order = [baseline, *(one for one in contestants if one is not baseline)]
    parts: dict[Contestant, list[np.ndarray]] = {one: [] for one in order}
    with _temporary_folder() as folder:
        reference = Path(folder) / "reference.npy"
        for number, item in enumerate(items, start=1):
            for one in order:
                advance(0, f"{name} {number} of {len(items)}: {one.label}")
                parts[one].append(one.call("compare", name, item, reference, one is baseline))
                advance(1)
    return {one: np.concatenate(rows) for one, rows in parts.items()}


def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(prefix="llmfast-bench-")
    except OSError as error:
        raise ResourceError(f"no temporary directory: {error.strerror}", "set TMPDIR") from error


def _file_figures(one: Contestant, metric: ModuleType, rows: np.ndarray, seed: int) -> None:
    figures = metric.figures(rows)
    intervals = row_intervals(rows, metric.figures, seed)
    per_unit = [metric.figures(row[None]) for row in rows] if len(rows) <= MAX_UNIT_SAMPLES else []
    for key, figure in figures.items():
        if figure is not None and not math.isfinite(figure):
            report.note(f"note: `{one.label}` has no {key}: it is not a finite number")
        one.figures[key] = _finite(figure)
        one.figures[f"{key}_spread"] = intervals[key]
        samples = [_finite(unit[key]) for unit in per_unit]
        if samples and None not in samples:
            one.samples[key] = [sample for sample in samples if sample is not None]


def _finite(figure: float | None) -> float | None:
    return float(figure) if figure is not None and math.isfinite(figure) else None
