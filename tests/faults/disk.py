"""A disk that fails: the N-th operation that writes below a folder raises an error, or kills the process.

After SQLite's tests (https://www.sqlite.org/testing.html#i_o_error_testing): a writer runs again and again with the
fault one operation later, until it gets through without meeting it.
"""

import builtins
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmfast import commit

Fault = Callable[[str, str], None]


class FailingDisk:
    """Counts the operations that change what is below a folder, and calls `fault` from the N-th on.

    Args:
        folder: what lies elsewhere is not counted.
        number: the first operation to fail, from 1.
        fault: raises; gets the operation's name and its path.
        persistent: all operations from then on fail, not one.

    Attributes:
        log: what was done, in order: the operation and its paths.
    """

    def __init__(self, folder: Path, number: int, fault: Fault, persistent: bool = False) -> None:
        self.folder, self.number, self.fault, self.persistent = str(folder), number, fault, persistent
        self.log: list[tuple[str, ...]] = []
        self._names: dict[int, str] = {}

    @property
    def reached(self) -> bool:
        return len(self.log) >= self.number

    def operation(self, name: str, *paths: Any) -> None:
        spelled = [os.path.abspath(os.fsdecode(path)) for path in paths]
        if not spelled[0].startswith(self.folder):
            return
        self.log.append((name, *spelled))
        if len(self.log) == self.number or (self.persistent and self.reached):
            self.fault(name, spelled[0])

    @contextmanager
    def active(self) -> Iterator["FailingDisk"]:
        opened, fsync = io.open, os.fsync

        def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return opened(file, mode, *arguments, **options)
            self.operation("open", file)
            return _Writer(self, file, opened(file, mode, *arguments, **options))

        def sync(descriptor: int) -> None:
            self.operation("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                self.operation(name, *[part for part in arguments if isinstance(part, str | bytes | os.PathLike)])
                return original(*arguments, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", open_file)
            patch.setattr(io, "open", open_file)
            patch.setattr(os, "fsync", sync)
            for name in ("rename", "replace", "mkdir"):
                patch.setattr(os, name, counted(name, getattr(os, name)))
            patch.setattr(commit, "exchange", counted("exchange", commit.exchange))
            yield self


class _Writer:
    """A file whose writes are counted."""

    def __init__(self, disk: FailingDisk, path: Any, file: Any) -> None:
        self._disk, self._path, self._file = disk, path, file

    def write(self, data: Any) -> int:
        self._disk.operation("write", self._path)
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def raising(code: int) -> Fault:
    """Return a fault that is an error of the operating system."""

    def fail(name: str, path: str) -> None:
        raise OSError(code, os.strerror(code), path)

    return fail


def kill(name: str, path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
