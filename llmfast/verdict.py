"""Gates: limits that a benchmark's figures must keep, and the verdict on each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmfast.errors import GateError, OptionError

PASSED = "passed"
MISSED = "MISSED"
INCONCLUSIVE = "inconclusive"
NOT_MEASURED = "not measured"

# Figures that are shares: people, and --max-drop, say points of a hundred.
SHARES = (
    *("accuracy", "changed_answers", "exact_match", "f1", "flipped_labels", "flipped_tokens", "same_answers"),
    *("false_negative_rate", "false_positive_rate", "recall_at_1", "recall_at_10", "top1_agreement"),
)
# Of lm-eval's tasks, whose figures are called TASK.METRIC.
_TASK_SHARES = ("acc", "acc_bytes", "acc_mutual_info", "acc_norm", "em", "exact_match", "f1")


def is_share(figure: str) -> bool:
    """Return whether a figure is a share of 1."""
    _, _, metric = figure.partition(".")
    return figure in SHARES or metric.partition(".")[0] in _TASK_SHARES


@dataclass(frozen=True)
class Gate:
    """A limit on one figure of every bundle but the baseline.

    Attributes:
        figure: a key of a row, e.g. `kld` or `decode_tokens_per_s_ratio`.
        limit: the worst value that passes.
        kind: whether the figure must be at most or at least the limit.
    """

    figure: str
    limit: float
    kind: Literal["max", "min"]

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit) or (self.limit < 0 and not self.figure.endswith("_change")):
            raise OptionError(f"gate on `{self.figure}`: the limit {self.limit} is not a number from 0 on")

    def passes(self, value: float) -> bool:
        """Return whether a value keeps the limit."""
        return value <= self.limit if self.kind == "max" else value >= self.limit

    def decide(self, value: float | None, spread: Sequence[float] | None) -> str:
        """Return `passed` or `MISSED`; `inconclusive` where the figure's interval includes the limit.

        Args:
            value: the figure, None when it could not be measured.
            spread: its 95 % interval, None when it has none.
        """
        if value is None:
            return NOT_MEASURED
        ends = [self.passes(end) for end in spread or (value,)]
        if all(ends):
            return PASSED
        return INCONCLUSIVE if any(ends) else MISSED


@dataclass(frozen=True)
class Judgement:
    """What became of a gate on a bundle.

    Attributes:
        bundle: its name.
        figure: a key of its row.
        kind: whether the figure must be at most or at least the limit.
        limit: the worst value that passes.
        value: the figure, None when it could not be measured.
        spread: its 95 % interval, None when it has none.
        verdict: `passed`, `MISSED`, `inconclusive` or `not measured`.
        passed: whether it counts as kept.
    """

    bundle: str
    figure: str
    kind: Literal["max", "min"]
    limit: float
    value: float | None
    spread: Sequence[float] | None
    verdict: str
    passed: bool


def parse_speedup(text: str) -> Gate:
    """Read `METRIC=X`, e.g. `prefill_tokens_per_s=2`: at least X times the baseline's speed.

    Raises:
        OptionError: not of that form.
    """
    metric, limit = _parse("--min-speedup", text, "decode_tokens_per_s=2")
    return Gate(f"{metric}_ratio", limit, "min")


def parse_drop(text: str, higher_is_better: Mapping[str, bool], compared: Sequence[str] = ()) -> Gate:
    """Read `METRIC=X`: the metric is worse than the baseline's by X at most, shares in points of a hundred.

    Args:
        text: as typed.
        higher_is_better: every figure of quality of this run.
        compared: those of them that mean something without a baseline; the others are distances from it already.

    Raises:
        OptionError: not of that form, or no such figure.
    """
    metric, drop = _parse("--max-drop", text, "accuracy=1")
    if metric not in higher_is_better:
        raise OptionError(
            f"--max-drop `{metric}`: no quality of this run", f"choose from: {', '.join(higher_is_better)}"
        )
    drop *= 0.01 if is_share(metric) else 1
    figure, unmoved = (f"{metric}_change", 0.0) if metric in compared else (metric, 1.0)
    if higher_is_better[metric]:
        return Gate(figure, unmoved - drop, "min")
    return Gate(figure, drop, "max")


def _parse(flag: str, text: str, example: str) -> tuple[str, float]:
    metric, _, number = text.partition("=")
    try:
        return metric.replace("-", "_"), float(number)
    except ValueError as error:
        raise OptionError(f"{flag} `{text}`: not METRIC=X", f"for example {flag} {example}") from error


def judge(
    rows: Sequence[Mapping[str, Any]],
    baseline: str,
    gates: Sequence[Gate],
    inconclusive: Literal["pass", "fail"] = "fail",
) -> list[dict[str, Any]]:
    """Return an entry per gate and bundle: `bundle`, `figure`, `kind`, `limit`, `value`, `spread`, `verdict`, `passed`.

    The baseline is judged only when it is alone. A figure that could not be measured does not pass.

    Args:
        rows: of a document.
        baseline: its name.
        gates: the limits.
        inconclusive: whether a gate passes when the interval of its figure includes the limit.
    """
    candidates = [row for row in rows if row["bundle"] != baseline] or list(rows)
    verdict = []
    for gate in gates:
        for row in candidates:
            value, spread = row.get(gate.figure), row.get(f"{gate.figure}_spread")
            decided = gate.decide(value, spread)
            entry = {"bundle": row["bundle"], "figure": gate.figure, "kind": gate.kind, "limit": gate.limit}
            passed = decided == PASSED or (decided == INCONCLUSIVE and inconclusive == "pass")
            verdict.append(entry | {"value": value, "spread": spread, "verdict": decided, "passed": passed})
    return verdict


def spell(entry: Mapping[str, Any]) -> str:
    """Return one entry of a verdict as a line for people: what was decided, of what, the number and the limit."""
    sign = "at most" if entry["kind"] == "max" else "at least"
    figure, value, limit, spread = entry["figure"], entry["value"], entry["limit"], entry["spread"]
    unit, scale = ("", 1.0)
    if figure.endswith("_bytes"):  # people, --max-size and --max-rss say megabytes
        unit, scale = " MB", 1e-6
    elif is_share(figure.removesuffix("_change")):
        unit, scale = " points" if figure.endswith("_change") else " %", 100.0
    if value is None:
        spelled, unit = NOT_MEASURED, ""
    else:
        spelled = f"{value * scale:.4g}"
        if spread and spread[0] != spread[1]:
            spelled += f" ({spread[0] * scale:.4g} to {spread[1] * scale:.4g})"
        spelled += unit
    state = MISSED if entry["verdict"] == NOT_MEASURED else entry["verdict"]
    return f"{state}: `{entry['bundle']}` {figure} {spelled}, asked {sign} {limit * scale:.4g}{unit}"


def enforce(verdict: Sequence[Mapping[str, Any]], hint: str = "the figures are above") -> None:
    """Raise when a gate did not pass.

    Args:
        verdict: what `judge` returned.
        hint: what the user can do.

    Raises:
        GateError: names every gate that did not pass.
    """
    failed = [entry for entry in verdict if not entry["passed"]]
    if not failed:
        return
    missed = [spell(entry).removeprefix(f"{MISSED}: ") for entry in failed]
    if all(entry["verdict"] == INCONCLUSIVE for entry in failed):
        raise GateError(
            f"gate {'; '.join(missed)}",
            "the interval includes the limit: more --rounds or more text decide it, or say --inconclusive pass",
        )
    raise GateError(f"gate missed: {'; '.join(missed)}", hint)
