"""A benchmark's document, printed: a table for people, Markdown for a pull request, JSON and CSV for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmfast import registry, report
from llmfast.bench.profile_table import print_profile
from llmfast.bench.workload import per_case
from llmfast.errors import OptionError
from llmfast.report import Column
from llmfast.verdict import INCONCLUSIVE, PASSED, is_share, spell

_NAMES = (Column("bundle", "bundle", align_right=False), Column("node", "node", align_right=False))
# Before a ratio: what its verdict is when it is neither better nor worse.
_MARKS = {"inconclusive": "~", "equal": "="}
_LEGEND = {
    "inconclusive": "~ inconclusive: the noise is larger than the difference",
    "equal": "= equal within {precision:g} %",
}
_ROOFLINE = (
    Column("{case}KV MB", "cache_bytes{case}", lambda value: f"{value / 1e6:.1f}"),
    Column("MB/token", "bytes_per_token{case}", lambda value: f"{value / 1e6:.1f}"),
    Column("{case}% of roofline", "roofline_share{case}", lambda value: f"{value * 100:.0f}"),
)
_GATES = (
    Column("", "mark", align_right=False),
    Column("bundle", "bundle", align_right=False),
    Column("gate", "gate", align_right=False),
)
_EMOJI = {PASSED: "✅", INCONCLUSIVE: "⚠️"}


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
    columns = make_columns(document)
    cells = [spell_row(row, columns) for row in document["rows"]]
    footer = make_footer(document)
    plain = [replace(column, spell=str) for column in columns]
    if format == "md":
        report.out(f"### llmfast bench: {spell_outcome(document)}\n\n{report.to_markdown(cells, plain)}\n")
        print_gates(document["verdict"], format)
        report.out("\n".join(f"- {report.escape_markdown(line)}" for line in footer))
    else:
        report.print_table(cells, plain)
        report.out("\n".join(footer))
        print_gates(document["verdict"], format)
    print_profile(document, format)


def print_gates(verdict: Sequence[Mapping[str, Any]], format: str) -> None:
    """Print the number and the verdict of every gate: a table in Markdown, else a line each."""
    if format != "md":
        for entry in verdict:
            report.out(report.printable(spell(entry)))
        return
    rows = [
        {"mark": _EMOJI.get(entry["verdict"], "❌"), "bundle": entry["bundle"], "gate": spell(entry)}
        for entry in verdict
    ]
    if rows:
        report.out(f"{report.to_markdown(rows, _GATES)}\n")


def spell_outcome(document: Mapping[str, Any]) -> str:
    """Return the run in a few words."""
    failed = sum("error" in row for row in document["rows"])
    missed = sum(not entry["passed"] for entry in document["verdict"])
    parts = [f"{failed} failed"] if failed else []
    if document["verdict"]:
        parts.append(f"{missed} of {len(document['verdict'])} gates missed" if missed else "all gates passed")
    return ", ".join(parts) or "no gates"


def make_columns(document: Mapping[str, Any]) -> list[Column]:
    """Return the columns of all metrics that this run measured, in the metrics' order."""
    metrics = [registry.load("bench.metrics", name) for name in registry.names("bench.metrics")]
    shapes = document["settings"]["shapes"]
    columns = [*_NAMES]
    groups = [metric.COLUMNS for metric in sorted(metrics, key=lambda metric: int(metric.ORDER))]
    for group in [*groups, _ROOFLINE]:
        is_per_case = any("{shape}" in column.key or "{case}" in column.key for column in group)
        for shape in shapes if is_per_case else [""]:
            name = f"{shape} " if len(shapes) > 1 else ""
            for column in group:
                key = dict(zip(shapes, per_case(column.key, shapes), strict=False)).get(shape, column.key)
                columns.append(replace(column, title=column.title.format(shape=shape, case=name), key=key))
    tasks = document["settings"].get("tasks") or {"figures": ()}
    columns += [_task_column(figure) for figure in tasks["figures"] if figure["in_table"]]
    measured = {key for row in document["rows"] for key in row}
    return [column for column in dict.fromkeys(columns) if column.key in measured]


def _task_column(figure: Mapping[str, Any]) -> Column:
    """Return the column of a figure of lm-eval."""
    title, key = report.printable(f"{figure['task']} {figure['metric']}"), figure["key"]
    if is_share(key):
        return Column(f"{title} %", key, lambda value: f"{value * 100:.1f}")
    return Column(title, key, "{:.4g}".format)


def spell_row(row: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, str | None]:
    """Return the row's cells as text; a ratio that shows no difference is marked."""
    cells: dict[str, str | None] = {}
    for column in columns:
        value = row.get(column.key)
        figure = column.key.removesuffix("_ratio")
        mark = _MARKS.get(row["verdict"].get(figure, ""), "") if figure != column.key else ""
        cells[column.key] = None if value is None else mark + column.spell(value)
    if row.get("provider", "cpu") != "cpu" and set(row["placement"]) == {"CPUExecutionProvider"}:
        cells["bundle"] = f"{row['bundle']} (ran on the CPU)"
    if "error" in row:
        cells["bundle"] = f"{row['bundle']} (failed)"
    return cells


def make_footer(document: Mapping[str, Any]) -> list[str]:
    """Return the lines without which the figures mean little."""
    machine, settings, rows = document["machine"], document["settings"], document["rows"]
    threads = ", ".join(map(str, settings["threads"]))
    lines = [f"{name}: {_spell_machine(node)}" for name, node in document.get("nodes", {}).items()]
    lines = lines or [_spell_machine(machine)]
    lines.append(f"onnxruntime {machine['onnxruntime']}, {', '.join(settings['provider'])}, {threads} threads")
    work = []
    if any(key.startswith("ttft_s") for row in rows for key in row):
        lengths = ", ".join(map(str, settings["prompt_tokens"]))
        widths = [width for width in settings["batch"] if settings["batch"] != [1]]
        at_once = f", {', '.join(map(str, widths))} sequences at once" if widths else ""
        work.append(f"{lengths} prompt and {settings['output_tokens']} output tokens{at_once}")
    if any("spread" in key for row in rows for key in row):
        work.append(f"medians of {settings['rounds']} interleaved rounds, x against `{document['baseline']}`")
    if settings["data"]:
        work.append(f"quality on `{settings['data']['name']}`")
    if tasks := settings.get("tasks"):
        documents = sum(tasks["documents"].values())
        work.append(f"{', '.join(tasks['names'])} by lm-eval {tasks['lm_eval']} on {documents} documents")
    lines += ["; ".join(work)] if work else []
    if bandwidth := machine.get("read_bandwidth_bytes_per_s"):
        spelled = ", ".join(f"{value / 1e9:.1f} GB/s with {count} threads" for count, value in bandwidth.items())
        lines.append(f"memory reads {spelled}")
    sources = {row["energy_source"] for row in rows if any(key.startswith("joules") for key in row)}
    lines += [f"energy: {source}" for source in sorted(source for source in sources if source)]
    words = {word for row in rows for word in row["verdict"].values()}
    lines += [line.format(precision=settings["precision"] * 100) for word, line in _LEGEND.items() if word in words]
    lines += [f"`{row['bundle']}` failed: {row['error']['message']}" for row in rows if "error" in row]
    return [report.printable(line) for line in lines]


def _spell_machine(machine: Mapping[str, Any]) -> str:
    isa = f" ({' '.join(machine['isa'])})" if machine["isa"] else ""
    load = "" if machine["load_average"] is None else f", load average {machine['load_average']:.1f}"
    return f"{machine['cpu']}{isa}, {machine['cores']} cores{load}"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as one line: `<name>_spread` as `<name>_low` and `<name>_high`, no samples."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith("_spread"):
            name = key.removesuffix("_spread")
            flat[f"{name}_low"], flat[f"{name}_high"] = value or (None, None)
        elif key == "placement":
            flat[key] = " ".join(f"{provider}:{nodes}" for provider, nodes in value.items())
        elif key == "verdict":
            flat |= {f"{name}_verdict": word for name, word in value.items()}
        elif key == "error":
            flat[key] = value["message"]
        elif not isinstance(value, (dict, list)):
            flat[key] = value
    return flat
