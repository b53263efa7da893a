"""Prompts from a file, one a line, and answers to a file that a run can go on with.

An answer is written when it is done, with a `key`: a hash of what it depends on, which is the model, the options and
the line. By the keys a run that was cut off finds what is done; a last line that was cut in the middle is dropped.
When all is done, the answers are put into the order of the input. Both files are read line by line.
"""

import hashlib
import json
import math
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import stage_file
from llmfast.errors import InputError, OutputExistsError, ResourceError
from llmfast.report import to_json

# What a power cut may cost.
_SYNC_EVERY_S = 5.0
_BEGINNING = b'{"id": '  # of every answer
_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        number: from 1.
        key: 64 bits that stand for line, number, model and options.
        fields: of the JSON object; those of a line of plain text are the text alone.
        error: why it can't be used; `fields` is then empty.
        place: where it stands, for messages.
    """

    number: int
    key: int
    fields: Mapping[str, Any]
    error: InputError | None = None
    place: str = ""

    @property
    def id(self) -> Any:
        """What the user calls the line; its number where it has no `id`."""
        return self.fields.get("id", self.number)


def is_jsonl(path: str | Path) -> bool:
    """Return whether a file's name says that it holds a JSON object a line."""
    return str(path).lower().endswith(_SUFFIXES)


def read_lines(path: Path, text_field: str, settings: str) -> Iterator[Line]:
    """Yield the lines of a file that are not blank.

    Args:
        path: JSON objects, one a line, in a file named `.jsonl` or `.ndjson`; else a text a line.
        text_field: what a line of plain text is called.
        settings: what all answers depend on beside the line; part of the keys.

    Raises:
        InputError: the file can't be read. A line that can't be used is yielded with its `error`.
    """
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"not a regular file: `{path}`", "the prompts are read twice: to plan, and to answer them")
    try:
        with path.open("rb") as file:
            yield from parse_lines(file, str(path), text_field, settings)
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error


def parse_lines(file: Iterable[bytes], name: str, text_field: str, settings: str, before: int = 0) -> Iterator[Line]:
    """Yield the lines that are not blank.

    Args:
        file: its lines.
        name: of the file, which says whether they are JSON.
        text_field: what a line of plain text is called.
        settings: what all answers depend on beside the line.
        before: lines of files that came before; numbers and keys go on from there.
    """
    for number, raw in enumerate(file, start=1):
        content = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if content := content.strip():
            yield _parse(content, before + number, f"`{name}`: line {number}", text_field, is_jsonl(name), settings)


def key_of(content: bytes, number: int, settings: str) -> int:
    """Return 64 bits that stand for a line, its number, and what else its answer depends on."""
    digest = hashlib.sha256(f"{settings}\n{number}\n".encode() + content).digest()
    return int.from_bytes(digest[:8], "big")


def _parse(content: bytes, number: int, place: str, text_field: str, is_json: bool, settings: str) -> Line:
    key = key_of(content, number, settings)

    def refused(reason: str) -> Line:
        return Line(number, key, {}, InputError(f"{place}: {reason}"), place)

    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return refused(f"not UTF-8 text: byte {error.start}")
    if not is_json:
        return Line(number, key, {text_field: text}, place=place)
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return refused(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return refused(f"not JSON: {error}")
    if not isinstance(fields, dict):
        return refused("not a JSON object")
    if not _is_name(fields.get("id", number)):
        return refused("`id` is neither a text nor a number")
    return Line(number, key, fields, place=place)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_name(value: Any) -> bool:
    """Return whether an answer can say it: no half of a surrogate pair or 1e999, which JSON can spell, is written."""
    if isinstance(value, str):
        return not any("\ud800" <= char <= "\udfff" for char in value)
    return not isinstance(value, (dict, list)) and not (isinstance(value, float) and math.isinf(value))


class AnswerFile:
    """The output of a long run: open, append, put in order.

    Args:
        path: new, or what a run with the same keys left.
        keys: uint64, of the lines that can be answered, in the order of the input.
        overwrite: start over, whatever the file holds; that goes when the first answer comes, or in the end.

    Attributes:
        done: bool, for each key whether its answer is in the file.
        dropped: a last line was cut in the middle and is gone.

    Raises:
        OutputExistsError: the file holds other things, or another process writes it.
        ResourceError: it can't be written.
    """

    def __init__(self, path: Path, keys: np.ndarray, overwrite: bool = False) -> None:
        self.path = path = path.resolve() if path.is_symlink() else path  # a link stays one
        self._keys = keys
        self._synced = time.monotonic()
        self._is_old = overwrite  # all that the file holds
        self._size = 0
        self.done: np.ndarray = np.zeros(len(keys), bool)
        self.dropped = False
        if path.is_dir():
            raise OutputExistsError(f"output is a directory: `{path}`", "name a file")
        try:
            # Not buffered: what was written survives the process, and a full disk shows at the line it cuts.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ResourceError(f"cannot write `{path}`: {error.strerror}") from error
        try:
            _lock(self._file.fileno(), path)
            if not overwrite:
                self._go_on()
        except BaseException:
            self._file.close()
            raise

    def _go_on(self) -> None:
        """Take over the answers that the file holds."""
        found, self._size = read_keys(self.path)
        if not np.isin(found, self._keys).all():
            raise OutputExistsError(
                f"output exists: `{self.path}` has answers of another model, other options or other prompts",
                "choose another --output, or add --overwrite",
            )
        self.done = np.isin(self._keys, found)
        self.dropped = self._size < self.path.stat().st_size
        self._file.truncate(self._size)

    def write(self, line: Line, answer: Mapping[str, Any]) -> None:
        """Append an answer.

        Raises:
            ResourceError: the disk is full; the file ends with the answer before.
        """
        record = {"id": line.id, **answer, "key": f"{line.key:016x}"}
        content = memoryview(f"{to_json(record, indent=None)}\n".encode())
        try:
            if self._is_old:
                self._file.truncate(0)
                self._is_old = False
            written = 0
            while written < len(content):
                written += self._file.write(content[written:]) or 0
            self._size += written
            if time.monotonic() - self._synced > _SYNC_EVERY_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            self._file.truncate(self._size)
            raise ResourceError(
                f"cannot write `{self.path}`: {error.strerror}; the answers before are kept",
                "make room, then run the same command again",
            ) from error

    def count(self) -> int:
        """Return how many answers the file holds: what a signal cuts off between a write and its counting is there."""
        if self._is_old:
            return 0
        with self.path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))

    def close(self) -> None:
        """Bring all to disk; a file without an answer is removed."""
        try:
            os.fsync(self._file.fileno())
            if not os.fstat(self._file.fileno()).st_size:
                self.path.unlink()
        except OSError as error:
            raise ResourceError(f"cannot write `{self.path}`: {error.strerror}") from error
        finally:
            self._file.close()

    def put_in_order(self) -> None:
        """Sort the answers like the lines of the input.

        Raises:
            ResourceError: no room for a second copy; the file stays as it is, complete but out of order.
        """
        if self._is_old:
            self.path.unlink(missing_ok=True)
        keys, starts = array("Q"), array("Q", [0])
        if not self.path.exists():
            return  # no line could be answered
        with self.path.open("rb") as file:
            for raw in file:
                keys.append(_recorded_key(raw, self.path))
                starts.append(file.tell())
        by_key = np.argsort(self._keys)
        places = by_key[np.searchsorted(self._keys, np.array(keys, np.uint64), sorter=by_key)]
        if (np.diff(places) > 0).all():
            return
        with stage_file(self.path, overwrite=True) as staged, self.path.open("rb") as file, staged.open("wb") as out:
            for place in np.argsort(places):
                file.seek(starts[place])
                out.write(file.readline())


def read_keys(path: Path) -> tuple[np.ndarray, int]:
    """Return the keys in a file of answers, uint64, and the bytes up to the end of its last whole line."""
    keys = array("Q")
    size = 0
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n") or not (raw.startswith(_BEGINNING) or _BEGINNING.startswith(raw)):
                keys.append(_recorded_key(raw, path))
                size += len(raw)
    return np.array(keys, np.uint64), size


def _recorded_key(raw: bytes, path: Path) -> int:
    try:
        return int(json.loads(raw)["key"], 16)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputExistsError(
            f"output exists: `{path}` is no file of answers", "choose another --output, or add --overwrite"
        ) from error


def _lock(descriptor: int, path: Path) -> None:
    """Keep other processes from writing the same file, until it is closed."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputExistsError(f"`{path}` is being written by another process", "wait for it") from error
