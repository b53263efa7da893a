"""Data a line a record, streamed: JSON lines, CSV, TSV, or plain lines; a large file costs no memory.

JSON lines and CSV name their columns. TSV may, in its first line; else its columns are taken in order, as those of
plain lines are, which are parted by tabs.
"""

import csv
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from llmfast.errors import InputError

# Other names that published data sets use for the columns.
_ALIASES = {
    "text": ("sentence", "content", "prompt"),
    "reference": ("target", "translation"),
    "a": ("sentence1", "first"),
    "b": ("sentence2", "second"),
    "sentence1": ("a", "first"),
    "sentence2": ("b", "second"),
    "document": ("passage",),
    "answer": ("answers",),
}

_JSON_LINES = (".jsonl", ".ndjson")

Item = TypeVar("Item")
Made = TypeVar("Made")

Parse = Callable[[str], Sequence[str]]


def is_json_lines(path: Path) -> bool:
    """Return whether a file holds a JSON value a line, by its name."""
    return path.suffix.lower() in _JSON_LINES


def is_table(path: Path) -> bool:
    """Return whether the columns of a file have names, or may have: .csv, .tsv, JSON lines."""
    return is_json_lines(path) or path.suffix.lower() in (".csv", ".tsv")


class _Streamed(Collection[Item]):
    def __contains__(self, item: object) -> bool:
        return any(one == item for one in self)


class Records(_Streamed[tuple[str, ...]]):
    """The records of a file, read anew each time they are iterated over; each is one string per column.

    Args:
        path: `.jsonl`, `.csv`, `.tsv`, or any other name for plain lines.
        columns: names of the columns, the last `optional` of which a record may lack (they are empty then).
        optional: how many.
        parse: turns a plain line into fields; None parts it at tabs.
        numeric: columns that hold numbers.
        fields: column -> its name in the file, where that is no usual one; None where there is no option to say so.
        skip_empty: leave records out that lack the value of a column, rather than refuse them.

    Raises:
        InputError: unreadable, not UTF-8, a record that lacks a column (named by its line), or no record at all.
    """

    def __init__(
        self,
        path: Path,
        *columns: str,
        optional: int = 0,
        parse: Parse | None = None,
        numeric: Sequence[str] = (),
        fields: Mapping[str, str] | None = None,
        skip_empty: bool = False,
    ) -> None:
        self._take_columns(path, columns, fields)
        self._optional, self._parse, self._skip_empty = optional, parse, skip_empty
        self._numeric = [columns.index(name) for name in numeric]
        self._count = sum(1 for _ in self)
        if not self._count:
            raise InputError(f"no usable line in `{path}`", f"each line is {self.form}")

    @classmethod
    def fits(cls, path: Path, *columns: str) -> bool:
        """Return whether the first record of a file has just these columns."""
        probe = cls.__new__(cls)
        probe._take_columns(path, columns, None)
        probe._optional, probe._parse, probe._skip_empty, probe._numeric = 0, None, False, []
        try:
            return len(next(probe._fields())[1]) == len(columns) and bool(next(iter(probe)))
        except (InputError, StopIteration):
            return False

    def _take_columns(self, path: Path, columns: Sequence[str], fields: Mapping[str, str] | None) -> None:
        self.path, self._wanted, self._fields_of = path, columns, fields
        fields = fields or {}
        self._columns = tuple(fields.get(name, name) for name in columns)
        self._spellings = [(fields[name],) if name in fields else (name, *_ALIASES.get(name, ())) for name in columns]

    def __len__(self) -> int:
        return self._count

    @property
    def form(self) -> str:
        """What a line of the file is like."""
        if is_json_lines(self.path):
            return "{" + ", ".join(f'"{name}": ...' for name in self._columns) + "}"
        if self.path.suffix.lower() == ".csv":
            return f"{','.join(self._columns)}, after a first line with these names"
        return "label text" if self._parse else "<TAB>".join(self._columns)

    def batches(self, size: int) -> "Batches":
        """Return the records in tuples of `size`, the last one may be shorter."""
        return Batches(self, size)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return (record for _, record in self.numbered())

    def numbered(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield the records, each with the number of its line, from 1."""
        for number, fields in self._fields():
            if not (self._skip_empty and not all(field.strip() for field in fields)):
                yield number, self._checked(number, fields)

    def _fields(self) -> Iterator[tuple[int, Sequence[str]]]:
        suffix = self.path.suffix.lower()
        read = self._json_lines if is_json_lines(self.path) else {".csv": self._csv, ".tsv": self._tsv}.get(suffix)
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
            values = [_pick(record, spellings) for spellings in self._spellings]
            if None in values[: len(values) - self._optional]:
                raise self._lacking(values, record, f"line {number} has no")
            yield number, [_spell(value) for value in values]

    def _csv(self, file: Iterator[str]) -> Iterator[tuple[int, Sequence[str]]]:
        reader = csv.reader(file)
        header = next(reader, [])
        places = self._places(header)
        if None in places[: len(places) - self._optional]:
            raise self._lacking(places, header, "no column")
        begins = reader.line_num + 1  # a row may have several lines
        for row in reader:
            if any(row):
                yield begins, self._taken(row, places, header, begins)
            begins = reader.line_num + 1

    def _tsv(self, file: Iterator[str]) -> Iterator[tuple[int, Sequence[str]]]:
        places: list[int | None] | None = None
        header: list[str] = []
        for number, line in enumerate(file, start=1):
            row = line.strip("\r\n").split("\t")
            if number == 1 and None not in (found := self._places(row))[: len(found) - self._optional]:
                places, header = found, row
            elif number == 1 and self._fields_of:
                raise self._lacking(found, row, "no column")
            elif places is not None and line.strip():
                yield number, self._taken(row, places, header, number)
            elif line.strip():
                yield number, self._parse(line.strip()) if self._parse and len(row) < 2 else row

    def _places(self, header: Sequence[str]) -> list[int | None]:
        """Return where each column is, None where the header lacks it."""
        names = [name.strip().casefold() for name in header]
        return [
            next((names.index(one.casefold()) for one in spellings if one.casefold() in names), None)
            for spellings in self._spellings
        ]

    def _taken(self, row: Sequence[str], places: Sequence[int | None], header: Sequence[str], number: int) -> list[str]:
        if len(row) > len(header):  # a separator that belongs to a text, perhaps
            raise InputError(f"`{self.path}`: line {number} has {len(row)} columns, not {len(header)}")
        return [row[place] if place is not None and place < len(row) else "" for place in places]

    def _lacking(self, found: Sequence[object], there: Iterable[str], what: str) -> InputError:
        place = next(place for place, one in enumerate(found) if one is None)
        names = ", ".join(list(there)[:10]) or "nothing"
        rename = f"; --field {self._wanted[place]}=NAME says which it is" if self._fields_of is not None else ""
        return InputError(f"`{self.path}`: {what} `{self._columns[place]}`", f"it has: {names}{rename}")


class Batches(_Streamed[tuple[tuple[str, ...], ...]]):
    """Records in tuples of a size, as many as there are, read as they are needed."""

    def __init__(self, records: Records, size: int) -> None:
        self._records, self._size = records, size

    def __len__(self) -> int:
        return -(-len(self._records) // self._size)

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], ...]]:
        batch: list[tuple[str, ...]] = []
        for record in self._records:
            batch.append(record)
            if len(batch) == self._size:
                yield tuple(batch)
                batch = []
        if batch:
            yield tuple(batch)


class Mapped(_Streamed[Made], Generic[Item, Made]):
    """What a function makes of the parts of a collection, one at a time."""

    def __init__(self, parts: Collection[Item], make: Callable[[Item], Made]) -> None:
        self._parts, self._make = parts, make

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Made]:
        return map(self._make, self._parts)


def _pick(record: dict[str, object], spellings: Sequence[str]) -> object:
    return next((record[one] for one in spellings if record.get(one) is not None), None)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _spell(value: object) -> str:
    if isinstance(value, list):
        return "\t".join(map(str, value))
    return "" if value is None else str(value)
