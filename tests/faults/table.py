"""The table of faults: each row says how it is made, and what must hold when llmfast meets it.

A row is a function that makes files below `place.folder` and returns a command line. What holds for every row is
checked by `test_table.py`: one error line and one hint at most, no traceback, nothing on stdout, inputs as they were,
no output, nothing left behind, little CPU time and memory.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MAX_CPU_S = 5.0  # most of it is what imports take in a process of its own
MAX_BYTES = 256 << 20


@dataclass
class Place:
    """Where a row's files lie, and models to damage.

    Attributes:
        folder: an empty directory.
        canary: a file outside, which nothing may read or write.
        decoder: a tiny text-generation bundle; do not change it.
        checkpoint: a tiny Hugging Face folder; do not change it.
        patch: undone after the row.
        changes: somebody else changes the model while the command runs.
    """

    folder: Path
    canary: Path
    decoder: Path
    checkpoint: Callable[[], Path]
    patch: pytest.MonkeyPatch
    changes: bool = False

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def own(self, source: Path, name: str = "model") -> Path:
        """Return a copy that may be damaged."""
        return Path(shutil.copytree(source, self.folder / name))


@dataclass(frozen=True)
class Fault:
    """One row of the table, or one of its variants.

    Attributes:
        row: its number in the table.
        what: the function's name, and the variant.
        make: makes the files and returns the command line.
        exit: the exit code.
        says: words of the error message; for exit code 0 of stderr.
        alone: in a process of its own, since a native crash or a leak of memory is possible.
        inside: the folder below `place.folder` that such a process starts in.
        writes: the command makes `output`.
    """

    row: str
    what: str
    make: Callable[[Place], Sequence[Any]] = field(repr=False)
    exit: int
    says: tuple[str, ...] = ()
    alone: bool = False
    writes: bool = False
    inside: str = ""

    def __str__(self) -> str:
        return f"{self.row}-{self.what}"


FAULTS: list[Fault] = []


def fault(
    row: str,
    exit: int,
    *says: str,
    each: dict[str, Any] | None = None,
    alone: bool = False,
    writes: bool = False,
    inside: str = "",
) -> Callable[[Callable[..., Sequence[Any]]], Callable[..., Sequence[Any]]]:
    """Add a function to the table; with `each`, once for every variant: name -> second argument."""

    def add(make: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        for name, value in (each or {"": None}).items():
            what = make.__name__ + (f"-{name}" if name else "")

            def call(place: Place, value: Any = value) -> Sequence[Any]:
                return make(place) if each is None else make(place, value)

            FAULTS.append(Fault(row, what, call, exit, says, alone, writes, inside))
        return make

    return add


def quantize(model: Path, place: Place, *more: Any) -> list[Any]:
    """Return the command line that most rows use: it reads a graph with all its weights."""
    return ["quantize", model, "-o", place.output, "--scheme", "int8", "--no-measure", *more]
