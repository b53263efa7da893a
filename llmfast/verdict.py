"""Gates: limits that a benchmark's figures must keep, and the verdict on each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmfast.errors import GateError, OptionError


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
        if not 0 <= self.limit < math.inf:
            raise OptionError(f"gate on `{self.figure}`: the limit {self.limit} is not a number from 0 on")

    def passes(self, value: float) -> bool:
        """Return whether a value keeps the limit."""
        return value <= self.limit if self.kind == "max" else value >= self.limit


def parse_speedup(text: str) -> Gate:
    """Read `METRIC=X`, e.g. `prefill_tokens_per_s=2`: at least X times the baseline's speed.

    Raises:
        OptionError: not of that form.
    """
    metric, _, factor = text.partition("=")
    try:
        limit = float(factor)
    except ValueError as error:
        raise OptionError(
            f"--min-speedup `{text}`: not METRIC=X", "for example --min-speedup decode_tokens_per_s=2"
        ) from error
    return Gate(f"{metric}_ratio", limit, "min")


def judge(rows: Sequence[Mapping[str, Any]], baseline: str, gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """Return one entry per gate and bundle: `bundle`, `figure`, `kind`, `limit`, `value`, `passed`.

    The baseline is judged only when it is alone. A figure that could not be measured does not pass.
    """
    candidates = [row for row in rows if row["bundle"] != baseline] or list(rows)
    verdict = []
    for gate in gates:
        for row in candidates:
            value = row.get(gate.figure)
            passed = value is not None and gate.passes(value)
            entry = {"bundle": row["bundle"], "figure": gate.figure, "kind": gate.kind, "limit": gate.limit}
            verdict.append(entry | {"value": value, "passed": passed})
    return verdict


def spell(entry: Mapping[str, Any]) -> str:
    """Return one entry of a verdict as a line for people."""
    sign = "at most" if entry["kind"] == "max" else "at least"
    state = "passed" if entry["passed"] else "MISSED"
    figure, value, limit = entry["figure"], entry["value"], entry["limit"]
    if figure == "size_bytes":  # people, and --max-size, say megabytes
        return f"{state}: `{entry['bundle']}` {value / 1e6:.1f} MB, asked {sign} {limit / 1e6:g} MB"
    spelled = "not measured" if value is None else f"{value:.4g}"
    return f"{state}: `{entry['bundle']}` {figure} {spelled}, asked {sign} {limit:g}"


def enforce(verdict: Sequence[Mapping[str, Any]], hint: str = "the figures are above") -> None:
    """Raise when a gate was missed.

    Args:
        verdict: what `judge` returned.
        hint: what the user can do.

    Raises:
        GateError: names every gate missed.
    """
    missed = [spell(entry).removeprefix("MISSED: ") for entry in verdict if not entry["passed"]]
    if missed:
        raise GateError(f"gate missed: {'; '.join(missed)}", hint)
