"""What an interrupted run goes on from: its last checkpoint and its log, in a hidden directory beside the output.

A checkpoint is written aside, synced and renamed, and only then its predecessor removed: a killed process or a full
disk leaves the last whole one. The directory belongs to one run: it holds the facts that the result depends on.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfast.bundle import read_json
from llmfast.errors import InputError, OutputExistsError, ResourceError

_FACTS = "run.json"
_LOG = "training.jsonl"
_STATE = re.compile(r"step-(\d+)\.pt")


class Snapshots:
    """The checkpoints of one run.

    Args:
        output: the run's output directory.
        facts: everything that the result depends on, as JSON.
        resume: go on; otherwise begin anew.
        overwrite: throw away what an earlier run left.

    Raises:
        InputError: resume is asked for and there is nothing, or another run's; the message names the fields.
        OutputExistsError: an interrupted run is there, and neither is asked for.
    """

    def __init__(self, output: Path, facts: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        self.folder = output.parent / f".{output.name}.tune-resume"
        self._facts = json.loads(json.dumps(facts))
        last = self.last()
        if resume:
            if last is None:
                raise InputError(f"nothing to resume: no checkpoint in `{self.folder}`", "leave out --resume")
            self._check_facts()
        elif last is not None and not overwrite:
            raise OutputExistsError(
                f"an interrupted run is there: `{self.folder}`, step {_step(last)}",
                "--resume goes on with it, --overwrite begins anew",
            )

    @property
    def log(self) -> Path:
        """The log's file."""
        return self.folder / _LOG

    def begin(self) -> None:
        """Make the directory of a run that begins anew."""
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            (self.folder / _FACTS).write_text(json.dumps(self._facts, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"cannot write to `{self.folder.parent}`: {error.strerror}") from error

    def last(self) -> Path | None:
        """Return the newest checkpoint, None when there is none."""
        found = [path for path in self.folder.glob("step-*.pt") if _STATE.fullmatch(path.name)]
        return max(found, key=_step, default=None)

    def read(self) -> dict[str, Any]:
        """Return the state of the newest checkpoint.

        Raises:
            InputError: it can't be read.
        """
        import torch

        path = self.last()
        assert path is not None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes it raise many kinds
            raise InputError(
                f"damaged checkpoint: `{path}`: {type(error).__name__}", "begin anew: --overwrite"
            ) from error
        return state

    def write(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint and remove older ones.

        Raises:
            ResourceError: it can't be written; the last one is still there.
        """
        import torch

        target = self.folder / f"step-{step:08d}.pt"
        part = target.with_suffix(".part")
        try:
            with part.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except (OSError, RuntimeError) as error:  # PyTorch turns a full disk into a RuntimeError
            part.unlink(missing_ok=True)
            last = self.last()
            kept = f"the checkpoint of step {_step(last)} is intact" if last else "there is no earlier checkpoint"
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ResourceError(
                f"cannot write the checkpoint of step {step} to `{self.folder}`: {reason}; {kept}",
                "make room, then run the same command with --resume" if last else "make room, and begin anew",
            ) from error
        for older in self.folder.glob("step-*.pt"):
            if older != target:
                older.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_facts(self) -> None:
        known = read_json(self.folder / _FACTS)
        known = known if isinstance(known, dict) else {}
        fields = [key for key in {**known, **self._facts} if known.get(key) != self._facts.get(key)]
        if fields:
            said = "; ".join(f"{key} was {_spell(known.get(key))}, is {_spell(self._facts.get(key))}" for key in fields)
            raise InputError(
                f"`{self.folder}` is of another run: {said}",
                "give the options it was started with, or begin anew: --overwrite in place of --resume",
            )


def _spell(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _step(path: Path) -> int:
    match = _STATE.fullmatch(path.name)
    assert match is not None
    return int(match[1])
