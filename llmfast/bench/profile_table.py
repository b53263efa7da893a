"""What `--profile` found, printed: time by operator and by role, the bundles side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmfast import report
from llmfast.report import Column

# Rows below this share (%) of a phase, and those after so many, are one row here; the JSON document has all of them.
_LEAST_SHARE = 1
_MOST_ROWS = 12
_REST, _OUTSIDE, _TOTAL = "everything else", "(outside of kernels)", "total"


def print_profile(document: Mapping[str, Any], format: str) -> None:
    """Print the profiles of a document on stdout, if it has any.

    Args:
        document: of a run.
        format: `table` or `md`.
    """
    profiled = [row for row in document["rows"] if "profile" in row]
    for phase in dict.fromkeys(one["phase"] for row in profiled for one in row["profile"]["phases"]):
        parts = {row["bundle"]: one for row in profiled for one in row["profile"]["phases"] if one["phase"] == phase}
        unit = next(iter(parts.values()))["unit"]
        for what, title in (("operators", "operator"), ("roles", "layer role")):
            columns = [Column(f"{phase}, by {title}", "name", align_right=False)]
            for number, name in enumerate(parts):
                columns.append(Column(f"{name} ms/{unit}", f"ms{number}", lambda value: f"{value:.3f}"))
                columns.append(Column("%", f"share{number}", lambda value: f"{value:.0f}"))
            _print(_side_by_side(list(parts.values()), what), columns, format)
    for row in profiled:
        for line in _spell_findings(row):
            report.out(f"- {report.escape_markdown(line)}" if format == "md" else report.printable(line))


def _side_by_side(phases: Sequence[Mapping[str, Any]], what: str) -> list[dict[str, Any]]:
    names = _largest(phases, what)
    rows: dict[str, dict[str, Any]] = {}
    for number, phase in enumerate(phases):
        seconds: dict[str, float] = {}
        for entry in phase[what]:
            name = entry["name"] if entry["name"] in names else _REST
            seconds[name] = seconds.get(name, 0.0) + entry["seconds"]
        for name, value in {**seconds, _OUTSIDE: phase["outside_s"], _TOTAL: phase["seconds"]}.items():
            row = rows.setdefault(name, {"name": name})
            row |= {f"ms{number}": value * 1e3, f"share{number}": 100 * value / phase["seconds"]}
    return [rows[name] for name in (*names, _REST, _OUTSIDE, _TOTAL) if name in rows]


def _largest(phases: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """Return the names of the rows to show, by what they take in the first bundle, then in the others."""
    shares: dict[str, list[float]] = {}
    for number, phase in enumerate(phases):
        for entry in phase[what]:
            share = shares.setdefault(entry["name"], [0.0] * len(phases))
            share[number] = 100 * entry["seconds"] / phase["seconds"]
    names = sorted((name for name in shares if max(shares[name]) >= _LEAST_SHARE), key=lambda name: -max(shares[name]))
    return sorted(names[:_MOST_ROWS], key=shares.__getitem__, reverse=True)


def _print(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], format: str) -> None:
    if format == "md":
        report.out(f"\n{report.to_markdown(rows, columns)}\n")
    else:
        report.print_table(rows, columns)


def _spell_findings(row: Mapping[str, Any]) -> list[str]:
    """Return lines on copies between devices, slow forms, and the gap to the roofline."""
    name, profile = row["bundle"], row["profile"]
    lines = []
    for phase in profile["phases"]:
        if phase["copies"]["calls"]:
            copies = phase["copies"]
            lines.append(
                f"`{name}`: {copies['calls']:.1f} copies between devices per {phase['unit']}, "
                f"{copies['seconds'] * 1e3:.3f} ms of {phase['phase']}"
            )
    if not any(phase["copies"]["calls"] for phase in profile["phases"]):
        lines.append(f"`{name}`: no copies between devices")
    for key in (key for key in row if key.startswith("roofline_share")):
        if row[key] is not None:
            case = key.removeprefix("roofline_share")
            lines.append(
                f"`{name}`: {row[f'bytes_per_token{case}'] / 1e6:.1f} MB are read for a token, which memory allows "
                f"{row[f'roofline_tokens_per_s{case}']:.1f} times a second: {row[key]:.0%} of that is reached"
            )
    for finding in profile["findings"]:
        what = f"{finding['nodes']} nodes: {finding['reason']} [{finding['rule']}]. Do: {finding['remedy']}"
        lines.append(f"`{name}`, slow form, {what}")
    if not profile["findings"]:
        lines.append(f"`{name}`: no slow form found")
    return lines
