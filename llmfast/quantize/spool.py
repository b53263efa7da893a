"""Arrays of a calibration run: some in memory, the rest in a temporary directory, so that memory has a bound."""

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

_HELD_BYTES = 256 << 20


class Spool:
    """Holds arrays under keys; what does not fit in memory goes to a file each, below TMPDIR.

    Args:
        held_bytes: the most that is kept in memory.
    """

    def __init__(self, held_bytes: int = _HELD_BYTES) -> None:
        self._free = held_bytes
        self._held: dict[tuple[int, str], np.ndarray] = {}
        self._files: dict[tuple[int, str], Path] = {}
        self._folder: Path | None = None
        self._names = itertools.count()

    def put(self, sample: int, name: str, array: np.ndarray) -> None:
        """Hold a value of a sample that is not held yet."""
        if array.nbytes <= self._free:
            self._free -= array.nbytes
            self._held[sample, name] = array
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="llmfast-calibration-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{next(self._names)}.npy"
        np.save(path, array)
        self._files[sample, name] = path

    def get(self, sample: int, name: str) -> np.ndarray:
        """Return a value that is held."""
        key = sample, name
        array: np.ndarray = self._held[key] if key in self._held else np.load(self._files[key])
        return array

    def drop(self, sample: int, name: str) -> None:
        """Forget a value."""
        key = sample, name
        if key in self._held:
            self._free += self._held.pop(key).nbytes
        else:
            self._files.pop(key).unlink()

    def row(self, sample: int, names: Sequence[str]) -> "Row":
        """Return values of one sample, read when they are looked at."""
        return Row(self, sample, names)

    def column(self, name: str, count: int) -> "Column":
        """Return a value of the first samples, read when it is looked at."""
        return Column(self, name, count)


class Column:
    """One value of every sample; an array is read each time that it is looked at."""

    def __init__(self, spool: Spool, name: str, count: int) -> None:
        self._spool, self._name, self._count = spool, name, count

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._spool.get(number, self._name) for number in range(self._count))


class Row(Mapping[str, np.ndarray]):
    """Values of one sample by name; an array is read each time that it is looked at."""

    def __init__(self, spool: Spool, sample: int, names: Sequence[str]) -> None:
        self._spool, self._sample, self._names = spool, sample, names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._spool.get(self._sample, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
