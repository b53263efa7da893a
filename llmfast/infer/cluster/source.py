"""The input of a run on a cluster: one file or many, here or in an object store, read in the order of their names.

Files of lines are read where the run was started, as one machine reads them, so that numbers, keys and messages are
the same; so are the rows of Parquet, by Arrow. Why not by Ray Data: docs/scale.md.
"""

import glob
import importlib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfast.cluster import need_ray
from llmfast.errors import InputError, UnsupportedError
from llmfast.infer.jsonl import Line, is_jsonl, key_of, parse_lines
from llmfast.report import to_json

_PARQUET = ".parquet"
_SUFFIXES = (".jsonl", ".ndjson", ".txt", _PARQUET)
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """Files that are read one after the other.

    Attributes:
        files: paths, without the scheme of an object store.
        store: Arrow's file system of the object store; None is this machine's.
    """

    files: tuple[str, ...]
    store: Any = None

    @property
    def is_parquet(self) -> bool:
        """Whether the files hold columns, not lines."""
        return self.files[0].lower().endswith(_PARQUET)

    def has_whole_ids(self) -> bool:
        """Return whether the lines of Parquet files are called by whole numbers: the first file tells.

        Raises:
            InputError: it can't be read.
        """
        if not self.is_parquet:
            return False
        parquet = import_arrow("pyarrow.parquet")
        with _reading(self.files[0]):
            schema = parquet.read_schema(self.files[0], filesystem=self.store)
        return "id" not in schema.names or import_arrow("pyarrow.types").is_integer(schema.field("id").type)

    def read(self, text_field: str, fields: Collection[str], settings: str) -> Iterator[Line]:
        """Yield the lines, numbered through all files.

        Args:
            text_field: what a line of plain text is called.
            fields: columns that are read of Parquet files.
            settings: what all answers depend on beside the line; part of the keys.

        Raises:
            InputError: a file can't be read. A line that can't be used is yielded with its `error`.
        """
        if self.is_parquet:
            yield from self._read_rows(fields, settings)
            return
        count = 0
        for name in self.files:
            before = count
            try:
                with self._open(name) as file:

                    def counted(file: Any = file) -> Iterator[bytes]:
                        nonlocal count
                        for raw in file:
                            count += 1
                            yield raw

                    yield from parse_lines(counted(), name, text_field, settings, before)
            except OSError as error:
                raise InputError(f"cannot read `{name}`: {error.strerror or error}") from error

    def _open(self, name: str) -> Any:
        if self.store is None:
            return Path(name).open("rb")
        return _Lines(self.store.open_input_stream(name, buffer_size=1 << 20))

    def _read_rows(self, fields: Collection[str], settings: str) -> Iterator[Line]:
        parquet = import_arrow("pyarrow.parquet")
        number = 0
        for name in self.files:
            with _reading(name), parquet.ParquetFile(name, filesystem=self.store) as file:
                columns = [column for column in file.schema_arrow.names if column in fields]
                if not set(columns) - {"id"}:
                    there = ", ".join(file.schema_arrow.names)
                    raise InputError(f"`{name}` has no column that says anything to this model: {there}")
                row = 0
                for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                    for content in batch.to_pylist():
                        row, number = row + 1, number + 1
                        yield _row(content, number, f"`{name}`: row {row}", settings)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what Arrow says of a file of columns that it can't read into an InputError."""
    arrow = import_arrow("pyarrow.lib")
    try:
        yield
    except (OSError, arrow.ArrowException) as error:
        raise InputError(f"cannot read `{name}`: {error}") from error


class _Lines:
    """The lines of a stream of Arrow's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        while block := self._stream.read(1 << 20):
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest


def _row(row: dict[str, Any], number: int, place: str, settings: str) -> Line:
    fields = {name: value for name, value in row.items() if value is not None}
    try:
        content = to_json(fields, indent=None).encode()
    except (ValueError, AttributeError, UnicodeEncodeError) as error:  # NaN, or bytes, dates and the like
        key = key_of(repr(fields).encode(), number, settings)
        return Line(number, key, {}, InputError(f"{place}: no text or number: {error}"), place)
    return Line(number, key_of(content, number, settings), fields, place=place)


def find_source(pattern: str) -> Source:
    """Find the files of an input.

    Args:
        pattern: a file, a directory, or a pattern with `*`; or a URI of an object store, `s3://bucket/data/*.parquet`.

    Raises:
        InputError: there is no such file, or files of lines and of columns are mixed.
        UnsupportedError: no such object store, or Arrow is not installed.
    """
    store, path = resolve(pattern)
    names = _list_local(path) if store is None else _list_store(store, path)
    if not names:
        raise InputError(f"no input: `{pattern}` is no file, and no directory with {', '.join(_SUFFIXES)}")
    if len({_kind(name) for name in names}) > 1:
        raise InputError(f"`{pattern}` are files of several kinds", "give those of one: a pattern with *.jsonl, say")
    return Source(tuple(names), store)


def resolve(path: str) -> tuple[Any, str]:
    """Return Arrow's file system of a URI, None for a path of this machine, and the path in it.

    Raises:
        UnsupportedError: no such object store, or Arrow is not installed.
    """
    if "://" not in path:
        return None, path
    try:
        # A pattern is no URI: what stands after the first * is put back afterwards.
        base, mark, query = path.partition("?")
        fixed, star, rest = base.partition("*")
        store, found = import_arrow("pyarrow.fs").FileSystem.from_uri(f"{fixed}{mark}{query}")
    except ValueError as error:
        raise UnsupportedError(f"cannot reach `{path}`: {error}", "s3://, gs://, hdfs://, abfs:// or a path") from error
    except OSError as error:
        hint = "are the store's name and address right? docs/scale.md says how they are given"
        raise UnsupportedError(f"cannot reach `{path}`: {error}", hint) from error
    if type(store).__name__ == "LocalFileSystem":
        store = None
    if star and fixed.endswith("/"):
        found = f"{found.rstrip('/')}/"
    return store, f"{found}{star}{rest}"


def _list_local(path: str) -> list[str]:
    if Path(path).is_dir():
        return sorted(str(one) for one in Path(path).iterdir() if one.suffix.lower() in _SUFFIXES and one.is_file())
    if Path(path).exists():
        return [path]
    return sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())


def _list_store(store: Any, path: str) -> list[str]:
    fs = import_arrow("pyarrow.fs")
    folder = path.partition("*")[0].rpartition("/")[0] if "*" in path else path
    try:
        if "*" not in path and store.get_file_info(path).type == fs.FileType.File:
            return [path]
        is_deep = "**" in path or "*" in path.rpartition("/")[0]
        found = store.get_file_info(fs.FileSelector(folder, recursive=is_deep))
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error}") from error
    names = sorted(one.path for one in found if one.type == fs.FileType.File)
    if "*" in path:
        return [name for name in names if _matches(name, path)]
    return [name for name in names if name.lower().endswith(_SUFFIXES)]


def _matches(name: str, pattern: str) -> bool:
    """Return whether a path fits a pattern as `glob` reads it: `*` is a part of a name, `**` any folders."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    parts = re.split(r"(\*\*/|\*\*|\*)", pattern)
    return re.fullmatch("".join(meanings.get(part, re.escape(part)) for part in parts), name) is not None


def _kind(name: str) -> str:
    return "columns" if name.lower().endswith(_PARQUET) else "objects" if is_jsonl(name) else "text"


def import_arrow(module: str) -> Any:
    """Return a module of Arrow.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise need_ray(error) from error
