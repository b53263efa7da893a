"""A benchmark's document, printed: a table for people, Markdown for a README, JSON and CSV for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmfast import registry, report
from llmfast.errors import OptionError
from llmfast.report import Column
from llmfast.verdict import spell

_NAME = Column("bundle", "bundle", align_right=False)
_UNSURE = "~"


def print_document(document: Mapping[str, Any], format: str = "table") -> None:
    """Print a document made by `bench` on stdout.

    Args:
        document: what `bench` returned.
        format: `table`, `md`, `json` or `csv`.

    Raises:
        OptionError: another format.
    """
    if format not in report.FORMATS:
        raise OptionError(f"unknown format `{format}`", f"choose from: {', '.join(report.FORMATS)}")
    if format == "json":
        report.out(report.to_json(document))
        return
    if format == "csv":
        report.out(report.to_csv([_flat(row) for row in document["rows"]]))
        return
    columns = _columns(document)
    cells = [_spelled(row, columns) for row in document["rows"]]
    footer = _footer(document, cells)
    plain = [replace(column, spell=str) for column in columns]
    if format == "md":
        report.out(report.to_markdown(cells, plain) + "\n\n" + "\n".join(f"- {line}" for line in footer))
        return
    report.print_table(cells, plain)
    report.out("\n".join(footer))


def _columns(document: Mapping[str, Any]) -> list[Column]:
    """Return the columns of all metrics that this run measured, in the metrics' order."""
    metrics = [registry.load("bench.metrics", name) for name in registry.names("bench.metrics")]
    columns = [_NAME]
    for metric in sorted(metrics, key=lambda metric: int(metric.ORDER)):
        is_per_shape = any("{shape}" in column.key for column in metric.COLUMNS)
        for shape in document["settings"]["shapes"] if is_per_shape else [""]:
            columns += [
                replace(column, title=column.title.format(shape=shape), key=column.key.format(shape=shape))
                for column in metric.COLUMNS
            ]
    measured = {key for row in document["rows"] for key in row}
    return [column for column in columns if column.key in measured]


def _spelled(row: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, str | None]:
    """Return the row's cells as text; a ratio whose interval includes 1 is marked."""
    cells: dict[str, str | None] = {}
    for column in columns:
        value = row.get(column.key)
        low, high = row.get(f"{column.key}_spread") or (1, 1)
        mark = _UNSURE if column.key.endswith("_ratio") and low <= 1 <= high and low < high else ""
        cells[column.key] = None if value is None else mark + column.spell(value)
    return cells


def _footer(document: Mapping[str, Any], cells: Sequence[Mapping[str, str | None]]) -> list[str]:
    """Return the lines without which the figures mean little."""
    machine, settings, rows = document["machine"], document["settings"], document["rows"]
    isa = f" ({' '.join(machine['isa'])})" if machine["isa"] else ""
    load = "" if machine["load_average"] is None else f", load {machine['load_average']:.1f} at start"
    lines = [
        f"{report.printable(machine['cpu'])}{isa}, {machine['cores']} cores{load}",
        f"onnxruntime {machine['onnxruntime']}, {settings['provider']}, {settings['threads']} threads",
    ]
    work = []
    if any("ttft_s" in row for row in rows):
        work.append(f"{settings['prompt_tokens']} prompt and {settings['output_tokens']} output tokens")
    if any("spread" in key for row in rows for key in row):
        work.append(f"medians of {settings['rounds']} interleaved rounds, x against `{document['baseline']}`")
    if settings["data"]:
        work.append(f"quality on `{settings['data']['name']}`")
    lines += ["; ".join(work)] if work else []
    if any((text or "").startswith(_UNSURE) for row in cells for text in row.values()):
        lines.append(f"{_UNSURE} the 95 % interval includes 1: no difference shown")
    lines += [spell(entry) for entry in document["verdict"]]
    return lines


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as one line: `<name>_spread` as `<name>_low` and `<name>_high`, no samples."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith("_spread"):
            name = key.removesuffix("_spread")
            flat[f"{name}_low"], flat[f"{name}_high"] = value or (None, None)
        elif key == "placement":
            flat[key] = " ".join(f"{provider}:{nodes}" for provider, nodes in value.items())
        elif key != "samples":
            flat[key] = value
    return flat
