"""Data a line a record, streamed: JSON lines, CSV, TSV, or plain lines; a large file costs no memory.

JSON lines and CSV name their columns. TSV may, in its first line; else its columns are taken in order, as those of
plain lines are, which are parted by tabs.
"""

import csv
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from llmfast.errors import InputError

# Other names that published data sets use for the columns.
_ALIASES = {
    "text": ("sentence", "content", "prompt"),
    "reference": ("target", "translation"),
    "a": ("sentence1", "first"),
    "b": ("sentence2", "second"),
    "document": ("passage",),
    "answer": ("answers",),
}

Item = TypeVar("Item")
Made = TypeVar("Made")

Parse = Callable[[str], Sequence[str]]


class Records:
    """The records of a file, read anew each time they are iterated over; each is one string per column.

    Args:
        path: `.jsonl`, `.csv`, `.tsv`, or any other name for plain lines.
        columns: names of the columns, the last `optional` of which a record may lack (they are empty then).
        optional: how many.
        parse: turns a plain line into fields; None parts it at tabs.
        numeric: columns that hold numbers.

    Raises:
        InputError: unreadable, not UTF-8, a record that lacks a column (named by its line), or no record at all.
    """

    def __init__(
        self, path: Path, *columns: str, optional: int = 0, parse: Parse | None = None, numeric: Sequence[str] = ()
    ) -> None:
        self.path, self._columns, self._optional, self._parse = path, columns, optional, parse
        self._numeric = [columns.index(name) for name in numeric]
        self._count = sum(1 for _ in self)
        if not self._count:
            raise InputError(f"no usable line in `{path}`", f"each line is {self.form}")

    @classmethod
    def fits(cls, path: Path, *columns: str) -> bool:
        """Return whether the first record of a file has just these columns."""
        probe = cls.__new__(cls)
        probe.path, probe._columns, probe._optional, probe._parse, probe._numeric = path, columns, 0, None, []
        try:
            return len(next(probe._fields())[1]) == len(columns) and bool(next(iter(probe)))
        except (InputError, StopIteration):
            return False

    def __len__(self) -> int:
        return self._count

    def __contains__(self, record: object) -> bool:
        return any(one == record for one in self)

    @property
    def form(self) -> str:
        """What a line of the file is like."""
        if self.path.suffix.lower() == ".jsonl":
            return "{" + ", ".join(f'"{name}": ...' for name in self._columns) + "}"
        if self.path.suffix.lower() == ".csv":
            return f"{','.join(self._columns)}, after a first line with these names"
        return "label text" if self._parse else "<TAB>".join(self._columns)

    def batches(self, size: int) -> "Batches":
        """Return the records in tuples of `size`, the last one may be shorter."""
        return Batches(self, size)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        for number, fields in self._fields():
            yield self._checked(number, fields)

    def _fields(self) -> Iterator[tuple[int, Sequence[str]]]:
        read = {".jsonl": self._json_lines, ".csv": self._csv, ".tsv": self._tsv}.get(self.path.suffix.lower())
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                yield from (read or self._plain)(file)
        except OSError as error:
            raise InputError(f"cannot read `{self.path}`: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 text: `{self.path}`", "convert it to UTF-8") from error
        except csv.Error as error:
            raise InputError(f"not a CSV file: `{self.path}`: {error}") from error

    def _checked(self, number: int, fields: Sequence[str]) -> tuple[str, ...]:
        needed = len(self._columns) - self._optional
        fields = tuple(field.strip() for field in fields)
        surplus = len(fields) - len(self._columns)
        is_whole = len(fields) >= needed and all(fields[:needed]) and (surplus <= 0 or self._optional > 0)
        if not is_whole or not all(_is_number(fields[place]) for place in self._numeric):
            raise InputError(f"malformed line: `{self.path}`: line {number}", f"each line is {self.form}")
        if surplus > 0:  # several answers
            return (*fields[: len(self._columns) - 1], "\t".join(fields[len(self._columns) - 1 :]))
        return fields + ("",) * -surplus

    def _plain(self, file: Iterator[str]) -> Iterator[tuple[int, Sequence[str]]]:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, self._parse(line.strip()) if self._parse else line.strip("\r\n").split("\t")

    def _json_lines(self, file: Iterator[str]) -> Iterator[tuple[int, Sequence[str]]]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"not JSON: `{self.path}`: line {number}", "each line is one JSON object") from error
            if isinstance(record, str):
                record = {self._columns[-1]: record}
            if not isinstance(record, dict):
                raise InputError(f"malformed line: `{self.path}`: line {number}", f"each line is {self.form}")
            yield number, [_spell(_pick(record, name)) for name in self._columns]

    def _csv(self, file: Iterator[str]) -> Iterator[tuple[int, Sequence[str]]]:
        reader = csv.reader(file)
        places = self._places(next(reader, []))
        if None in places[: len(places) - self._optional]:
            raise InputError(f"`{self.path}` lacks a column", f"each line is {self.form}")
        for row in reader:
            if any(row):
                yield (
                    reader.line_num,
                    [row[place] if place is not None and place < len(row) else "" for place in places],
                )

    def _tsv(self, file: Iterator[str]) -> Iterator[tuple[int, Sequence[str]]]:
        places: list[int | None] | None = None
        for number, line in enumerate(file, start=1):
            row = line.strip("\r\n").split("\t")
            if number == 1 and None not in self._places(row)[: len(self._columns) - self._optional]:
                places = self._places(row)
            elif places is not None and line.strip():
                yield number, _take(row, places)
            elif line.strip():
                yield number, self._parse(line.strip()) if self._parse and len(row) < 2 else row

    def _places(self, header: Sequence[str]) -> list[int | None]:
        """Return where each column is, None where the header lacks it."""
        names = [name.strip().casefold() for name in header]
        spellings = [(name, *_ALIASES.get(name, ())) for name in self._columns]
        return [next((names.index(one) for one in spelling if one in names), None) for spelling in spellings]


class Batches:
    """Records in tuples of a size, as many as there are, read as they are needed."""

    def __init__(self, records: Records, size: int) -> None:
        self._records, self._size = records, size

    def __len__(self) -> int:
        return -(-len(self._records) // self._size)

    def __contains__(self, batch: object) -> bool:
        return any(one == batch for one in self)

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], ...]]:
        batch: list[tuple[str, ...]] = []
        for record in self._records:
            batch.append(record)
            if len(batch) == self._size:
                yield tuple(batch)
                batch = []
        if batch:
            yield tuple(batch)


def _take(row: Sequence[str], places: Sequence[int | None]) -> list[str]:
    return [row[place] if place is not None and place < len(row) else "" for place in places]


class Mapped(Generic[Item, Made]):
    """What a function makes of the parts of a collection, one at a time."""

    def __init__(self, parts: Collection[Item], make: Callable[[Item], Made]) -> None:
        self._parts, self._make = parts, make

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, item: object) -> bool:
        return any(one == item for one in self)

    def __iter__(self) -> Iterator[Made]:
        return map(self._make, self._parts)


def _pick(record: dict[str, object], name: str) -> object:
    return next((record[one] for one in (name, *_ALIASES.get(name, ())) if one in record), "")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _spell(value: object) -> str:
    if isinstance(value, list):
        return "\t".join(map(str, value))
    return str(value)
