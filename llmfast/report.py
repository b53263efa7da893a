"""What llmfast prints: tables in four formats on stdout, notes and progress on stderr."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from llmfast.errors import LlmfastError

_WIDE = 10_000
_is_shown = False  # a progress bar; a terminal has room for one
FORMATS = ("table", "md", "json", "csv")
_is_quiet = ContextVar("is_quiet", default=False)


@dataclass(frozen=True)
class Column:
    """A column of a table for people: header, the key in the row, and how to spell the value."""

    title: str
    key: str
    spell: Callable[[Any], str] = str
    align_right: bool = True


def to_json(document: Any, indent: int | None = 2) -> str:
    """Return a JSON document, arrays of NumPy as lists; NaN and infinity are errors, since JSON has neither."""
    return json.dumps(document, indent=indent, allow_nan=False, ensure_ascii=False, default=_listed)


def _listed(array: Any) -> Any:
    return array.tolist()


def to_markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Return a GitHub-flavoured table."""
    lines = ["| " + " | ".join(escape_markdown(column.title) for column in columns) + " |"]
    lines.append("|" + "|".join("--:" if column.align_right else "---" for column in columns) + "|")
    lines += ["| " + " | ".join(map(escape_markdown, _cells(row, columns))) + " |" for row in rows]
    return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Return a foreign string that can neither end a cell of a table nor begin an element of HTML."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line per row under the union of their keys; a cell that a spreadsheet would run is quoted."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(keys)
    for row in rows:
        cells = ["" if row.get(key) is None else row[key] for key in keys]
        writer.writerow(
            [
                f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
                for cell in cells
            ]
        )
    return out.getvalue().rstrip("\n")


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """Print a table on stdout, plain when stdout is not a terminal.

    On a terminal that is too narrow it lies on its side; where it does not fit so either, its rows stand one below
    another, with a line for each cell.
    """
    from rich.console import Console, Group

    titles = [column.title for column in columns]
    cells = [_cells(row, columns) for row in rows]
    table = _make_table(titles, cells, [column.align_right for column in columns])
    if sys.stdout.isatty():
        console = Console()
        if not _fits(table, console):
            first, *others = zip(titles, *cells, strict=True)
            table = _make_table(first, others, [False] + [True] * len(cells))
            if not _fits(table, console):
                table = Group(*[_make_record(titles, row) for row in cells])
        console.print(table)
        return
    console = Console(width=_WIDE, color_system=None)  # a pipe has no edge to wrap at
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    out("\n".join(line for line in lines if line))


def _make_table(titles: Sequence[str], cells: Sequence[Sequence[str]], align_right: Sequence[bool]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for title, right in zip(titles, align_right, strict=True):
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for line in cells:
        table.add_row(*[Text(cell) for cell in line])
    return table


def _fits(table: Any, console: Any) -> bool:
    return bool(console.measure(table, options=console.options.update(width=_WIDE)).maximum <= console.width)


def _make_record(titles: Sequence[str], row: Sequence[str]) -> Any:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    record = Table.grid(padding=(0, 2))
    record.add_column(no_wrap=True, style="bold")
    record.add_column(overflow="fold")
    for title, cell in zip(titles, row, strict=True):
        if cell:
            record.add_row(Text(title), Text(cell))
    return Padding(record, (0, 0, 1, 2))


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], output_format: str) -> None:
    """Print rows on stdout in one of `FORMATS`."""
    if output_format == "json":
        out(to_json(rows))
    elif output_format == "csv":
        out(to_csv(rows))
    elif output_format == "md":
        out(to_markdown(rows, columns))
    else:
        print_table(rows, columns)


def note(message: str) -> None:
    """Print one line on stderr."""
    if not _is_quiet.get():
        print(message, file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def without_notes() -> Iterator[None]:
    """Print no notes while the body of `with` runs: those of a stage that is a means to another one's end."""
    before = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(before)


def complain(error: LlmfastError) -> None:
    """Print what went wrong, and what to do about it."""
    note(f"error: {printable(error.message)}")
    if error.hint:
        note(f"\nhint: {printable(error.hint)}")


def out(text: str) -> None:
    """Print a result on stdout."""
    print(text, flush=True)  # noqa: T201


def write(piece: str) -> None:
    """Print a piece of a result on stdout at once, without ending the line."""
    print(piece, end="", flush=True)  # noqa: T201


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr while the body runs; silent when stderr is not a terminal, or shows one already.

    Args:
        description: what is being done.
        total: number of steps; None shows that something moves without saying how far it is.

    Yields:
        `advance(steps=1, description=None)`.
    """
    global _is_shown
    if _is_shown or not sys.stderr.isatty():
        yield lambda steps=1, description=None: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [MofNCompleteColumn(), TimeRemainingColumn()] if total else []
    bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(description, total=total)
        _is_shown = True

        def advance(steps: float = 1, description: str | None = None) -> None:
            bar.update(task, advance=steps, description=description)

        try:
            yield advance
        finally:
            _is_shown = False


def _cells(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    return ["-" if row.get(column.key) is None else printable(column.spell(row[column.key])) for column in columns]


def printable(text: str) -> str:
    """Escape control characters of a foreign string, so that it cannot drive the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
