"""Work that survives an interruption: the rounded layers of one run, in a hidden directory beside its output.

Each piece is written aside and renamed, so that a killed process leaves whole pieces only. The directory belongs
to one run: its key is a hash of everything that the result depends on.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.errors import LlmfastError, ResourceError
from llmfast.graph.packed import Grid, QuantizedWeight
from llmfast.report import note

_KEY_FILE = "key"


class Checkpoint:
    """The pieces of one run that are done.

    Args:
        output: the run's output directory; the pieces lie beside it until `discard`.
        facts: everything the result depends on, as JSON.
        resume: use the pieces of a run that was interrupted; otherwise begin anew.

    Raises:
        ResourceError: the directory cannot be written.
    """

    def __init__(self, output: Path, facts: dict[str, Any], resume: bool) -> None:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        self._folder = output.parent / f".{output.name}.llmfast-resume"
        known = self._known_key()
        if known and (not resume or known != key):
            if resume:
                note(f"note: `{self._folder}` is from a run with another model or other options: starting anew")
            self.discard()
            known = None
        elif resume and not known:
            note("note: nothing to resume: starting from the first layer")
        elif known:
            note(f"note: resuming with {len(list(self._folder.glob('*.npz')))} layers that are done")
        if not known:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._put(_KEY_FILE, key.encode())
            except OSError as error:
                raise ResourceError(f"cannot write to `{output.parent}`: {error.strerror}") from error

    def weight(self, name: str, grid: Grid) -> QuantizedWeight | None:
        """Return a layer that was rounded, None when it was not."""
        path = self._path(name, grid)
        if not path.is_file():
            return None
        try:
            with np.load(path) as held:
                zero_points = None if grid.symmetric else held["zero_points"]
                return QuantizedWeight(held["codes"], held["scales"], zero_points, grid, int(held["in_features"]))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            note(f"note: `{path}` is damaged: its layer is rounded again")
            return None

    def keep_weight(self, name: str, weight: QuantizedWeight) -> None:
        """Keep a layer that was rounded."""
        zero_points = np.empty(0) if weight.zero_points is None else weight.zero_points
        path = self._path(name, weight.grid)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(
                file,
                codes=weight.codes,
                scales=weight.scales,
                zero_points=zero_points,
                in_features=np.array(weight.in_features),
            )
        os.replace(part, path)

    def record(self, name: str) -> Any:
        """Return a JSON document that was kept, None when there is none."""
        path = self._folder / f"{_short(name)}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep_record(self, name: str, document: Any) -> None:
        """Keep a JSON document."""
        self._put(f"{_short(name)}.json", json.dumps(document).encode())

    def discard(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _known_key(self) -> str | None:
        path = self._folder / _KEY_FILE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def _path(self, name: str, grid: Grid) -> Path:
        return self._folder / f"{_short(f'{name} {grid}')}.npz"

    def _put(self, name: str, content: bytes) -> None:
        part = self._folder / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, self._folder / name)


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


@contextlib.contextmanager
def kept_for_resuming(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Discard a checkpoint at the end, and after an error that would come again; say so when an interrupt leaves it."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint:
            note("note: the same command with --resume goes on where this one stopped")
        raise
    except LlmfastError as error:
        if checkpoint and not isinstance(error, ResourceError):
            checkpoint.discard()
        raise
    if checkpoint:
        checkpoint.discard()
