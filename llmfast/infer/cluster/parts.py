"""The output of a run on a cluster: a folder of parts, each the answers to a fixed number of lines in their order.

A part is written answer by answer into a hidden file beside it (`.part-00000.jsonl`), which a run that was cut off
goes on with, and gets its name when it is complete: who reads `part-*` never sees half of one. In an object store,
whose files can't grow, the hidden file lies on this machine, and a part that was cut off is begun again.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import stage_file
from llmfast.commit import is_staged
from llmfast.errors import OptionError, OutputExistsError, ResourceError
from llmfast.infer.cluster.source import import_arrow, resolve
from llmfast.infer.jsonl import AnswerFile, Line, read_keys
from llmfast.report import to_json

FORMATS = ("jsonl", "parquet")
_NAME = re.compile(r"\.?part-(\d{5,})\.(?:jsonl|parquet)")


class Part:
    """The answers to some lines that follow one another.

    Attributes:
        missing: lines that have no answer yet.
        before: answers that an earlier run left.
        written: answers of this run.
    """

    def __init__(self, folder: "PartFolder", number: int, lines: list[Line]) -> None:
        self._folder, self._number = folder, number
        keys = np.array([line.key for line in lines], np.uint64)
        self._file = folder.open(number, keys)
        done = np.ones(len(lines), bool) if self._file is None else self._file.done
        self.missing = [line for line, is_done in zip(lines, done, strict=True) if not is_done]
        self.before = int(done.sum())
        self.written = 0
        self._open = len(self.missing)
        if not self._open:
            self._finish()

    @property
    def is_open(self) -> bool:
        """Whether lines have no answer yet."""
        return self._open > 0

    def settle(self, line: Line, answer: dict[str, Any] | None) -> None:
        """Write an answer, or None: there will be none; after the last one the part is published."""
        if answer is not None:
            assert self._file is not None
            self._file.write(line, answer)
            self.written += 1
        self._open -= 1
        if not self._open:
            self._finish()

    def close(self) -> None:
        """Let go of a part that is not complete; it is there for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _finish(self) -> None:
        if self._file is not None:
            file = self._file
            self.close()
            file.put_in_order()
            self._folder.publish(self._number)


class PartFolder:
    """Where the parts are.

    Args:
        path: a directory, or a URI of an object store.
        form: `jsonl` or `parquet`.
        whole_ids: the column `id` of Parquet has whole numbers, not texts.
        overwrite: start over; the parts that are there go when the first new one is opened.

    Attributes:
        keeps_halves: whether the answers of a part that is not complete are there for the next run.

    Raises:
        OutputExistsError: it holds other things, or parts of the other form.
        ResourceError: it can't be written.
    """

    def __init__(self, path: str, form: str, whole_ids: bool, overwrite: bool) -> None:
        if form not in FORMATS:
            raise OptionError(f"unknown --parts `{form}`", f"choose from: {', '.join(FORMATS)}")
        self.path, self._form, self._whole_ids = path, form, whole_ids
        self._store, self._folder = resolve(path)
        self.keeps_halves = self._store is None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        try:
            if self._store is None:
                Path(self._folder).mkdir(parents=True, exist_ok=True)
                self._spool = Path(self._folder)
            else:
                self._store.create_dir(self._folder, recursive=True)  # without the bucket this fails now, not at a part
                self._temporary = tempfile.TemporaryDirectory(prefix="llmfast-parts-")
                self._spool = Path(self._temporary.name)
            self._check(overwrite)
        except FileExistsError as error:
            raise OutputExistsError(f"output is a file: `{path}`", "name a folder for the parts") from error
        except OSError as error:
            raise ResourceError(f"cannot write `{path}`: {error.strerror or error}") from error

    def open(self, number: int, keys: np.ndarray) -> AnswerFile | None:
        """Open a part to write answers; None when it has them all.

        Raises:
            OutputExistsError: it has answers of other lines, another model or other options.
            ResourceError: parts that are to be overwritten can't be removed.
        """
        while self._old:
            self._remove(self._old.pop())
        spool = self._spool_path(number)
        if not spool.exists() and number in self._published:
            self._copy_back(number, spool)
            found, _ = read_keys(spool)
            if np.array_equal(np.sort(found), np.sort(keys)):
                spool.unlink()
                return None
            if not np.isin(found, keys).all():
                spool.unlink()
                raise OutputExistsError(
                    f"output exists: `{self.path}/{self._name(number)}` has answers of another model, other options "
                    "or other prompts",
                    "choose another --output, or add --overwrite",
                )
        return AnswerFile(spool, keys)

    def publish(self, number: int) -> None:
        """Give a complete part its name; one without any answer has none."""
        spool, name = self._spool_path(number), self._name(number)
        if not spool.exists():
            return
        try:
            if self._store is None and self._form == "jsonl":
                os.replace(spool, self._spool / name)
            elif self._store is None:
                with stage_file(self._spool / name, overwrite=True) as staged:
                    self._write(spool, staged)
            elif self._form == "jsonl":
                with spool.open("rb") as file, self._store.open_output_stream(f"{self._folder}/{name}") as out:
                    shutil.copyfileobj(file, out)
            else:
                with self._store.open_output_stream(f"{self._folder}/{name}") as out:
                    self._write(spool, out)
            spool.unlink(missing_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot write `{self.path}/{name}`: {error.strerror or error}") from error
        self._published.add(number)

    def close(self) -> None:
        """Let go of the folder."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def check_end(self, count: int) -> None:
        """Refuse parts of an earlier, longer input.

        Args:
            count: parts that the whole input has.

        Raises:
            OutputExistsError: there are more.
        """
        beyond = sorted(number for number in self._published if number >= count)
        if beyond:
            raise OutputExistsError(
                f"`{self.path}/{self._name(beyond[0])}` has answers to lines that the input no longer has",
                "choose another --output, or add --overwrite",
            )

    def _check(self, overwrite: bool) -> None:
        """Note which parts are there, and which of them will be overwritten; what is no part is refused."""
        found = [name for name in self._names() if not is_staged(name)]
        strange = [name for name in found if not _NAME.fullmatch(name)]
        other = [name for name in found if not name.endswith(f".{self._form}") and not name.startswith(".")]
        if strange or (other and not overwrite):
            raise OutputExistsError(
                f"output exists: `{self.path}` holds `{(strange or other)[0]}`", "choose another --output"
            )
        self._old = found if overwrite else []
        names = [name for name in found if not name.startswith(".") and name not in self._old]
        self._published = {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}

    def _remove(self, name: str) -> None:
        try:
            if self._store is None:
                (self._spool / name).unlink()
            else:
                self._store.delete_file(f"{self._folder}/{name}")
        except OSError as error:
            raise ResourceError(f"cannot remove `{self.path}/{name}`: {error.strerror or error}") from error

    def _names(self) -> Iterator[str]:
        if self._store is None:
            yield from (entry.name for entry in self._spool.iterdir())
        else:
            fs = import_arrow("pyarrow.fs")
            selector = fs.FileSelector(self._folder, allow_not_found=True)
            yield from (one.base_name for one in self._store.get_file_info(selector))

    def _name(self, number: int) -> str:
        return f"part-{number:05}.{self._form}"

    def _spool_path(self, number: int) -> Path:
        return self._spool / f".part-{number:05}.jsonl"

    def _copy_back(self, number: int, spool: Path) -> None:
        name = self._name(number)
        source = self._spool / name if self._store is None else f"{self._folder}/{name}"
        if self._form == "jsonl":
            if self._store is None:
                shutil.copyfile(source, spool)
            else:
                with self._store.open_input_stream(source) as stream, spool.open("wb") as out:
                    shutil.copyfileobj(stream, out)
            return
        table = import_arrow("pyarrow.parquet").read_table(source, filesystem=self._store)
        with spool.open("w", encoding="utf-8") as out:
            for batch in table.to_batches():
                for row in batch.to_pylist():
                    out.write(f"{to_json(row, indent=None)}\n")

    def _write(self, spool: Path, target: Any) -> None:
        """Write the answers of a hidden file as a table; vectors as float32."""
        arrow = import_arrow("pyarrow")
        with spool.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if not self._whole_ids:
            rows = [{**row, "id": str(row["id"])} for row in rows]
        table = arrow.Table.from_pylist(rows)
        for place, field in enumerate(table.schema):
            if field.type == arrow.list_(arrow.float64()):
                values = table.column(place).cast(arrow.list_(arrow.float32()))
                table = table.set_column(place, field.name, values)
        import_arrow("pyarrow.parquet").write_table(table, target)
