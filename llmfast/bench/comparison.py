"""Two documents compared: what became better or worse since an older run, with the verdicts of a single one.

Rounds of two runs are no pairs: the machine may have been in another mood. Where both runs measured the same
baseline, speeds are therefore compared relative to it, whose rounds were interleaved with the bundle's in each run.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from llmfast import registry, report
from llmfast.bench.gating import of_every_task
from llmfast.bench.statistics import (
    RESAMPLES,
    Interval,
    decide,
    oriented,
    paired_ratios,
    simultaneous,
    unpaired_interval,
)
from llmfast.bench.table import print_gates
from llmfast.bench.workload import per_case
from llmfast.errors import InputError, OptionError
from llmfast.report import Column
from llmfast.verdict import Gate, judge, parse_drop

# What must agree for speeds to be of the same work.
_SAME_WORK = ("shapes", "output_tokens")
# What may differ, and should be known of.
_MACHINE = ("cpu", "cores", "isa", "memory_bytes", "os", "python", "onnxruntime", "llmfast")

# One observation each: what differs less says nothing.
_OBSERVED_ONCE = {"load_s": 0.5, "peak_rss_bytes": 0.05}

_COLUMNS = (
    Column("bundle", "bundle", align_right=False),
    Column("figure", "figure", align_right=False),
    Column("old", "old", "{:.4g}".format),
    Column("new", "new", "{:.4g}".format),
    Column("x or change", "moved", align_right=False),
    Column("verdict", "verdict", align_right=False),
)


def compare_documents(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    names: tuple[str, str],
    gates: Sequence[Gate] = (),
    max_drops: Sequence[str] = (),
    inconclusive: Literal["pass", "fail"] = "fail",
) -> dict[str, Any]:
    """Compare the bundles that two documents share.

    Args:
        old: a document of `bench`.
        new: a later one.
        names: of both.
        gates: limits; `<speed>_ratio` is the new speed over the old one.
        max_drops: further limits, `METRIC=X`: how much worse a figure of quality may have become.
        inconclusive: whether a gate passes when the interval of its figure includes the limit.

    Returns:
        `schema_version`, `old` and `new` (the names), `warnings`, `rows` (one per bundle and figure: `bundle`,
        `figure`, `old`, `new`, `ratio` and `ratio_spread` (above 1 is better) or `change` and `change_spread`,
        `basis`, `verdict`), and `verdict` on the gates.

    Raises:
        InputError: no bundle in common, or speeds of different work.
        OptionError: a gate on what the documents do not hold.
    """
    for key in _SAME_WORK:
        ours, theirs = new["settings"].get(key), old["settings"].get(key)
        if ours != theirs:
            raise InputError(f"`{names[0]}` and `{names[1]}` measured different work: {key} {theirs} and {ours}")
    pairs = [(before, row) for row in new["rows"] if (before := _counterpart(row, old)) is not None]
    if not pairs:
        have = ", ".join(dict.fromkeys(f"`{row['bundle']}`" for row in old["rows"]))
        raise InputError(f"no bundle of `{names[1]}` is in `{names[0]}`", f"the older one has {have}")
    figures = [figure for before, row in pairs for figure in _compare_row(before, row, old, new)]
    failed = [{"bundle": row["bundle"], "error": row["error"]} for _, row in pairs if "error" in row]
    return {
        "schema_version": new["schema_version"],
        "old": names[0],
        "new": names[1],
        "warnings": _warn(old, new, pairs),
        "rows": [*figures, *failed],
        "verdict": judge(_judged(figures), "", _resolve(gates, max_drops, figures, new["settings"]), inconclusive),
    }


def print_comparison(comparison: Mapping[str, Any], format: str) -> None:
    """Print what `compare_documents` returned on stdout, in one of `report.FORMATS`."""
    rows = [
        row | {"moved": _spell_move(row)} if "figure" in row else row | {"figure": "failed"}
        for row in comparison["rows"]
    ]
    if format in ("json", "csv"):
        report.out(report.to_json(comparison) if format == "json" else report.to_csv(rows))
        return
    if format == "md":
        report.out(f"### llmfast bench: {comparison['old']} -> {comparison['new']}\n")
    report.print_rows(rows, _COLUMNS, format)
    print_gates(comparison["verdict"], format)


def _spell_move(row: Mapping[str, Any]) -> str:
    is_ratio = row["ratio"] is not None
    value, spread = (row["ratio"], row["ratio_spread"]) if is_ratio else (row["change"], row["change_spread"])
    if value is None:
        return "-"
    form = "{:.3f}" if is_ratio else "{:+.4g}"
    interval = f" ({form.format(spread[0])} to {form.format(spread[1])})" if spread else ""
    return f"{'x' if is_ratio else ''}{form.format(value)}{interval}"


def _compare_row(
    before: Mapping[str, Any], after: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[dict[str, Any]]:
    metrics = list(_figures(after["task"], new["settings"]))
    speeds = [key for kind, key, _ in metrics if kind == "speed" and before["samples"].get(key)]
    confidence = simultaneous(len(speeds))
    data = [document["settings"].get("data") or {} for document in (old, new)]
    same_data = data[0].get("sha256") == data[1].get("sha256")
    same_questions = _questions(old) == _questions(new)
    rows = []
    for kind, key, is_higher in metrics:
        ours, theirs = after.get(key), before.get(key)
        if ours is None or theirs is None or not {"quality": same_data, "task": same_questions}.get(kind, True):
            continue
        row = {"bundle": after["bundle"], "figure": key, "old": theirs, "new": ours}
        row |= {"ratio": None, "ratio_spread": None, "change": None, "change_spread": None, "basis": "raw"}
        if kind == "speed":
            row |= _compare_speed(before, after, old, new, key, is_higher, confidence)
        elif kind == "static":
            row |= _compare_static(key, theirs, ours, is_higher)
        else:
            interval = _change_interval(before, after, key, ours - theirs)
            sign = 1 if is_higher else -1
            verdict = decide(sign * (ours - theirs), oriented(interval, sign), 0.0, neutral=0.0)
            row |= {"change": ours - theirs, "change_spread": interval and list(interval), "verdict": verdict}
        rows.append(row)
    return rows


def _compare_speed(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    key: str,
    is_higher: bool,
    confidence: float,
) -> dict[str, Any]:
    ours, theirs = after["samples"].get(key, []), before["samples"].get(key, [])
    basis = "raw"
    references = [_baseline(document, row) for document, row in ((old, before), (new, after))]
    if _is_same_model(*references) and after["bundle"] != new["baseline"]:
        baselines = [reference["samples"].get(key, []) for reference in references]
        if len(baselines[0]) == len(theirs) > 0 and len(baselines[1]) == len(ours) > 0:
            # Improvements over the same baseline: above 1 is better, whatever the figure.
            theirs = paired_ratios(theirs, baselines[0], is_higher)
            ours = paired_ratios(ours, baselines[1], is_higher)
            basis, is_higher = "baseline", True
    if not ours or not theirs or min(*ours, *theirs) <= 0:
        return {"verdict": "inconclusive"}
    ratio = float(np.median(ours) / np.median(theirs))
    ratio = ratio if is_higher else 1 / ratio
    precision = max(document["settings"]["precision"] for document in (old, new))
    interval = unpaired_interval(ours, theirs, is_higher, 0, confidence)
    spread = unpaired_interval(ours, theirs, is_higher, 0, 0.95)
    verdict = decide(ratio, interval, precision)
    return {"ratio": ratio, "ratio_spread": spread and list(spread), "basis": basis, "verdict": verdict}


def _compare_static(key: str, old: float, new: float, is_higher: bool) -> dict[str, Any]:
    if min(old, new) <= 0:
        return {"verdict": "inconclusive"}
    ratio = new / old if is_higher else old / new
    noise = _OBSERVED_ONCE.get(key, 0.0)
    interval = (ratio * (1 - noise), ratio * (1 + noise))
    return {"ratio": ratio, "verdict": decide(ratio, interval, 0.0)}


def _change_interval(before: Mapping[str, Any], after: Mapping[str, Any], key: str, change: float) -> Interval | None:
    """Return the 95 % interval of a change: over units where both have them, else as far as the intervals lie apart."""
    ours, theirs = after["samples"].get(key, []), before["samples"].get(key, [])
    if len(ours) == len(theirs) > 1:
        moved = np.subtract(ours, theirs)
        draws = np.random.default_rng(0).integers(len(moved), size=(RESAMPLES, len(moved)))
        low, high = np.quantile(moved[draws].mean(axis=1), [0.025, 0.975]) - moved.mean() + change
        return float(low), float(high)
    if change == 0:
        return 0.0, 0.0
    now, then = after.get(f"{key}_spread"), before.get(f"{key}_spread")
    return (now[0] - then[1], now[1] - then[0]) if now and then else None


def _questions(document: Mapping[str, Any]) -> str:
    """Return the hash of what lm-eval asked, empty where it asked nothing."""
    return str((document["settings"].get("tasks") or {}).get("sha256", ""))


def _figures(task: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield kind, key and whether higher is better of every figure of a task, in the order of tables."""
    metrics = [registry.load("bench.metrics", name) for name in registry.names("bench.metrics")]
    for metric in sorted(metrics, key=lambda metric: int(metric.ORDER)):
        if not metric.TASKS or task in metric.TASKS:
            for template, is_higher in metric.HIGHER_IS_BETTER.items():
                for key in per_case(template, settings["shapes"]):
                    yield metric.KIND, key, is_higher
    for figure in (settings.get("tasks") or {}).get("figures", ()):
        yield "task", figure["key"], figure["higher_is_better"]


def _counterpart(row: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the row of a bundle in another document; of a baseline that several nodes measured the same node's."""
    found = [one for one in document["rows"] if one["bundle"] == row["bundle"]]
    return next((one for one in found if len(found) == 1 or one.get("node") == row.get("node")), None)


def _baseline(document: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row of the baseline that another row of a document was measured beside."""
    found = (one for one in document["rows"] if one["bundle"] == document["baseline"])
    return next(one for one in found if one.get("node") == row.get("node"))


def _is_same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["model_sha256"]) and one["model_sha256"] == other["model_sha256"]


def _warn(
    old: Mapping[str, Any], new: Mapping[str, Any], pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> list[str]:
    warnings = [
        f"another machine or software: {key} was {old['machine'].get(key)}, is {new['machine'].get(key)}"
        for key in _MACHINE
        if old["machine"].get(key) != new["machine"].get(key)
    ]
    for before, row in pairs:
        for key in ("provider", "threads", "processor"):
            if row.get(key) != before.get(key):
                warnings.append(f"`{row['bundle']}` ran on another {key}: {before.get(key)}, now {row.get(key)}")
    before, after = pairs[0]
    is_alone = all(row["bundle"] == new["baseline"] for _, row in pairs)
    if is_alone or not _is_same_model(_baseline(old, before), _baseline(new, after)):
        warnings.append("speeds are of two moments of the machine: no baseline in common says how they differ")
    if (old["settings"].get("data") or {}).get("sha256") != (new["settings"].get("data") or {}).get("sha256"):
        warnings.append("quality was measured on different data, and is not compared")
    if _questions(old) and _questions(new) and _questions(old) != _questions(new):
        warnings.append("lm-eval asked other questions, and its tasks are not compared")
    return warnings


def _resolve(
    gates: Sequence[Gate], max_drops: Sequence[str], figures: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Gate]:
    """Return the gates; those that no figure of the comparison answers are refused."""
    higher = {
        key: is_higher
        for name in registry.names("bench.metrics")
        for metric in [registry.load("bench.metrics", name)]
        if metric.KIND == "quality"
        for key, is_higher in metric.HIGHER_IS_BETTER.items()
    }
    higher |= {one["key"]: one["higher_is_better"] for one in (settings.get("tasks") or {}).get("figures", ())}
    found = {row["figure"] for row in figures}
    drops = [one for text in max_drops for one in of_every_task(text, higher)]
    resolved = [*gates, *(parse_drop(text, higher, list(higher)) for text in drops)]
    for gate in resolved:
        figure = gate.figure if gate.figure in found else gate.figure.removesuffix("_ratio").removesuffix("_change")
        if figure not in found:
            raise OptionError(f"gate on `{figure}`: the documents do not hold it", f"choose from: {', '.join(found)}")
    return resolved


def _judged(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per bundle with the keys that gates look for."""
    rows: dict[str, dict[str, Any]] = {}
    for one in figures:
        row, key = rows.setdefault(one["bundle"], {"bundle": one["bundle"]}), one["figure"]
        row |= {key: one["new"], f"{key}_ratio": one["ratio"], f"{key}_ratio_spread": one["ratio_spread"]}
        row |= {f"{key}_change": one["change"], f"{key}_change_spread": one["change_spread"]}
    return list(rows.values())
