"""What `llmfast inspect` prints: tables for people, Markdown for a README, JSON and CSV for programs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmfast import report
from llmfast.report import Column

_LAYERS = (
    Column("role", "role", align_right=False),
    Column("layers", "layers"),
    Column("parameters", "num_parameters", "{:,}".format),
    Column("weights", "weights", align_right=False),
    Column("block", "block_size", lambda size: str(size) if size else "row"),
    Column("zero points", "symmetric", lambda symmetric: "no" if symmetric else "yes"),
    Column("activations", "activations", align_right=False),
    Column("MB", "bytes", lambda size: f"{size / 1e6:.2f}"),
)
_VALUES = (
    Column("", "way", align_right=False),
    Column("name", "name", align_right=False),
    Column("dtype", "dtype", align_right=False),
    Column("shape", "shape", lambda shape: f"[{', '.join(map(str, shape))}]", align_right=False),
)
_FILES = (
    Column("file", "name", align_right=False),
    Column("bytes", "bytes", "{:,}".format),
)


def print_document(document: Mapping[str, Any], output_format: str) -> None:
    """Print the document of an `Inspection` on stdout, in one of `report.FORMATS`."""
    if output_format == "json":
        report.out(report.to_json(document))
    elif output_format == "csv":
        rows = [{"graph": graph["role"], **layer} for graph in document["graphs"] for layer in graph["layers"]]
        report.out(report.to_csv(rows))
    else:
        _print_pages(document, _MarkdownPage() if output_format == "md" else _Page())


class _Page:
    """Lines and tables as a terminal shows them."""

    def title(self, text: str) -> None:
        report.out(report.printable(text))

    def line(self, text: str) -> None:
        report.out(report.printable(text))

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
        report.print_table(rows, columns)


class _MarkdownPage(_Page):
    """The same as GitHub shows them."""

    def title(self, text: str) -> None:
        report.out(f"\n### {report.printable(text)}\n")

    def line(self, text: str) -> None:
        report.out(f"- {report.printable(text)}")

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
        report.out(f"\n{report.to_markdown(rows, columns)}\n")


def _print_pages(document: Mapping[str, Any], page: _Page) -> None:
    bits = document["bits_per_weight"]
    size = f"{document['size_bytes'] / 1e6:.1f} MB" + (f", {bits:.2f} bits per weight" if bits else "")
    page.title(f"{document['model']}: {document['task']}; {document['num_parameters']:,} parameters; {size}")
    if sizes := _spell_architecture(document["architecture"]):
        page.line(sizes)
    for step in document["lineage"]:
        page.line(f"{step['stage']} {step['method']}{_spell_options(step)}")
    for graph in document["graphs"]:
        page.title(f"{graph['role']}: {graph['file']}, opset {graph['opset']}, {graph['producer']}".rstrip(", "))
        page.table(graph["layers"], _LAYERS)
        page.table(_values(graph), _VALUES)
        page.line(f"operators: {_spell_counts(graph['operators'])}")
        page.line("stored as: " + ", ".join(f"{row['dtype']} {row['bytes'] / 1e6:.2f} MB" for row in graph["dtypes"]))
        if cache := graph["cache"]:
            page.line(_spell_cache(cache))
    page.table(document["files"], _FILES)
    findings = [(graph["file"], finding) for graph in document["graphs"] for finding in graph["findings"]]
    for file, finding in findings:
        where = f"{finding['nodes']} nodes of {file}, the first is `{finding['example']}`"
        page.line(f"{finding['affects']}: {finding['reason']} [{finding['rule']}: {where}]. Do: {finding['remedy']}")
    if not findings:
        page.line("no slow form found")


def _spell_architecture(architecture: Mapping[str, Any]) -> str:
    simple = {key: value for key, value in architecture.items() if isinstance(value, (int, str)) and value != ""}
    return ", ".join(f"{key} {value}" for key, value in simple.items() if key != "num_parameters")


def _spell_options(step: Mapping[str, Any]) -> str:
    chosen = dict(_flatten("", step["options"]))
    spelled = " ".join(f"{key}={value}" for key, value in chosen.items() if value not in (None, ""))
    return f" ({spelled})" if spelled else ""


def _flatten(prefix: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _values(graph: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each input and output, and one for all that hold a cache."""
    rows = []
    for way in ("input", "output"):
        for value in graph[f"{way}s"]:
            if value["name"].startswith(("past", "present")):
                value = value | {"name": re.sub(r"\d+", "*", value["name"])}
            rows.append({"way": way, **value, "shape": tuple(value["shape"])})
    return [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]


def _spell_counts(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.rpartition('.')[2]}" for name, count in operators.items())


def _spell_cache(cache: Mapping[str, Any]) -> str:
    line = f"KV cache: {cache['bytes_per_token']:,} bytes per token"
    if cache["bytes_at_context"]:
        line += f", {cache['bytes_at_context'] / 1e6:.1f} MB at {cache['context_length']} tokens"
    return line
