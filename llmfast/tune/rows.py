"""Data files as rows: text, tables, held-back rows, and the batches of an epoch."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from llmfast.errors import InputError
from llmfast.text import read_text

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
# Batches are made of rows of like length, found among so many batches' worth of rows in random order.
_SORTED_BATCHES = 50
Item = TypeVar("Item")


@dataclass(frozen=True)
class Record:
    """A line of a table.

    Attributes:
        line: its number in the file, from 1.
        values: one per column.
    """

    line: int
    values: tuple[str, ...]


def is_table(path: Path) -> bool:
    """Return whether a file has named columns: .csv, .tsv, .jsonl."""
    return path.suffix.lower() in (*_SEPARATORS, *_JSON_LINES)


def read_table(path: Path, columns: Sequence[str], fields: Mapping[str, str]) -> list[Record]:
    """Read some columns of a .csv, .tsv or .jsonl file.

    Args:
        path: a table; its first line names the columns, unless it is .csv or .tsv and has just those wanted, in order.
        columns: which columns, and in which order.
        fields: column -> its name in the file, where it is another one.

    Raises:
        InputError: malformed, or a column is missing; the message names the line.
    """
    names = [fields.get(column, column) for column in columns]
    text = read_text(path)
    if path.suffix.lower() in _JSON_LINES:
        return [
            _from_json(path, line, names, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    separator = _SEPARATORS[path.suffix.lower()]
    # Quotes of a .tsv are quotes: they begin and end sentences, not fields.
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
    )
    records = [Record(reader.line_num, tuple(cells)) for cells in reader if any(cell.strip() for cell in cells)]
    header, places = records[0].values, list(range(len(names)))
    if set(names) <= set(header):
        places, records = [header.index(name) for name in names], records[1:]
        width = len(header)
    elif len(header) == len(names) and not fields:
        width = len(names)
    else:
        raise InputError(
            f"`{path}` has no column `{next(name for name in names if name not in header)}`",
            f"it has: {', '.join(header[:10])}; --field {columns[0]}=NAME says which is the {columns[0]}",
        )
    for record in records:
        if len(record.values) != width:
            raise InputError(f"`{path}`: line {record.line} has {len(record.values)} columns, not {width}")
    if not records:
        raise InputError(f"no rows in `{path}`", "there is nothing below the header")
    return [Record(record.line, tuple(record.values[place].strip() for place in places)) for record in records]


def _from_json(path: Path, line: str, names: Sequence[str], number: int) -> Record:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"not JSON: `{path}`: line {number}", "each line is one JSON object") from error
    missing = next((name for name in names if not isinstance(entry, dict) or entry.get(name) is None), None)
    if missing is not None:
        held = f"it has: {', '.join(entry)}" if isinstance(entry, dict) else "it is no object"
        raise InputError(f"`{path}`: line {number} has no `{missing}`", f"{held}; --field {missing}=NAME renames one")
    return Record(number, tuple(str(entry[name]).strip() for name in names))


def read_passages(path: Path, fields: Mapping[str, str]) -> list[str]:
    """Read a text as one passage, or the `text` column of a table as one each."""
    if not is_table(path):
        return [read_text(path)]
    return [text for record in read_table(path, ["text"], fields) if (text := record.values[0])]


def split(rows: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Hold rows back, picked at random; at least one when any are wanted.

    Raises:
        InputError: too few rows.
    """
    if not share:
        return list(rows), []
    count = max(1, round(len(rows) * share))
    if count >= len(rows):
        raise InputError(
            f"too little data: {len(rows)} row, and {count} held back for validation",
            "give more, or --validation FILE, or --validation-split 0",
        )
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    held = set(order[:count].tolist())
    return [row for index, row in enumerate(rows) if index not in held], [rows[index] for index in sorted(held)]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of an epoch: a function of its arguments alone, so that a run can go on in the middle.

    Args:
        lengths: int [rows]; a batch has rows of like length, so that little is padding.
        batch_size: rows of a batch; the last one may have fewer.
        seed: of the run.
        epoch: from 0.

    Returns:
        Indices of rows; every row once.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * _SORTED_BATCHES):
        chosen = order[start : start + batch_size * _SORTED_BATCHES]
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        batches += [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))]


def in_order_of_length(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Yield batches for measuring: every row once, short ones first."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
