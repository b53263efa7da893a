"""Rows D1 to D3 with commands as they are: a disk that fails, or a process that dies, at each of their operations.

What `commit.py` promises is tested operation by operation in `test_commit.py`; here are the commands that keep more
than one output: prune, tune with its snapshots, and the file of answers that grows.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from llmfast.bundle import MANIFEST, sha256
from llmfast.cli import app
from llmfast.verify import hash_files
from tests import tiny_decoder
from tests.faults.disk import FailingDisk, kill, raising
from tests.tiny_tune import write_text

_NEVER = 1 << 30
_ROOT = Path(__file__).parents[2]
_WRITES = 4
_TIMED = {"training.jsonl", "curves.svg", "proof.json"}  # they tell how long something took


@dataclass(frozen=True)
class Command:
    """A command line whose output is `place / output`, and the folder of an interrupted run, if it leaves one."""

    arguments: list[str]
    output: str
    resume: str = ""

    def run(self, place: Path, *more: str) -> Result:
        arguments = [*self.arguments, "-o", str(place / self.output), *more]
        return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "decoder").mkdir()
    tiny_decoder.write_bundle(folder / "decoder")
    shutil.copytree(checkpoints("llama-tied"), folder / "checkpoint")
    write_text(folder)
    prompts = [json.dumps({"prompt": "x" * (index + 1)}) for index in range(4)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    return folder


def _command(name: str, inputs: Path) -> Command:
    decoder, checkpoint = str(inputs / "decoder"), str(inputs / "checkpoint")
    if name == "prune":
        return Command(["prune", decoder, "--method", "magnitude", "--ratio", "0.5"], "bundle")
    if name == "prune-checkpoint":
        return Command(["prune", checkpoint, "--method", "ffn", "--ratio", "0.5"], "checkpoint")
    if name == "infer":
        prompts = str(inputs / "prompts.jsonl")
        return Command(["infer", decoder, "--input", prompts, "--max-tokens", "3"], "answers.jsonl", "answers.jsonl")
    steps = ["--max-steps", "2", "--save-every", "1", "--batch-size", "2", "--precision", "fp32", "--threads", "1"]
    return Command(["tune", checkpoint, "--data", str(inputs / "text.txt"), *steps], "tuned", ".tuned.tune-resume")


def _content(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): sha256(file) for file in files if file.name not in _TIMED}


def _moments(log: list[tuple[str, ...]]) -> list[int]:
    """Return the numbers of the operations; of writes to the same file in a row a few, since a plot has thousands."""
    rows = 0
    numbers = []
    for number, entry in enumerate(log, 1):
        rows = rows + 1 if entry[0] == "write" and entry == log[number - 2] else 0
        if rows < _WRITES:
            numbers.append(number)
    return numbers


def _check(command: Command, place: Path, whole: dict[str, str]) -> None:
    """What is there is whole, or what the same command goes on with; nothing else is left."""
    output = place / command.output
    assert set(os.listdir(place)) <= {command.output, command.resume}
    if output.is_dir():
        assert _content(output) == whole
        if (output / MANIFEST).exists():
            assert {row["verdict"] for row in hash_files(output)} == {"ok"}


@pytest.mark.parametrize("name", ["prune", "prune-checkpoint", "tune", "infer"])
def test_a_command_on_a_failing_disk(name: str, inputs: Path, tmp_path: Path) -> None:
    """Every second fault goes away by itself, the others stay."""
    command, place = _command(name, inputs), tmp_path / "place"
    place.mkdir()
    with FailingDisk(place, _NEVER, kill).active() as clean:
        assert command.run(place).exit_code == 0
    whole, before = _content(place / command.output), _content(inputs)
    for index, number in enumerate(_moments(clean.log)):
        shutil.rmtree(place)
        place.mkdir()
        with FailingDisk(place, number, raising(errno.ENOSPC), persistent=index % 2 == 1).active() as disk:
            result = command.run(place)
        assert disk.reached
        assert "Traceback" not in result.output
        assert _content(inputs) == before
        _check(command, place, whole)
        if result.exit_code == 0:  # what failed once was done another way
            assert _content(place / command.output) == whole
            continue
        assert result.exit_code == 6, (clean.log[number - 1], result.output, result.exc_info)
        assert result.stderr.count("error: ") == 1
        if index % 5 == 0 and not (place / command.output).is_dir():
            has_more = command.resume.startswith(".") and (place / command.resume).exists()
            again = command.run(place, *(["--resume"] if has_more else []))
            assert again.exit_code == 0, again.output
            assert _content(place / command.output) == whole
    assert index >= 5


# Kills itself at an operation; a process of its own, since the libraries' threads do not survive a fork.
_KILLED = """
import sys
from pathlib import Path
from llmfast.cli import app
from tests.faults.disk import FailingDisk, kill
place, number, *arguments = sys.argv[1:]
with FailingDisk(Path(place), int(number), kill).active():
    app(arguments)
"""


@pytest.mark.parametrize("name", ["prune", "infer"])
def test_a_command_that_is_killed(name: str, inputs: Path, tmp_path: Path) -> None:
    command, place = _command(name, inputs), tmp_path / "place"
    place.mkdir()
    with FailingDisk(place, _NEVER, kill).active() as clean:
        assert command.run(place).exit_code == 0
    output = place / command.output
    whole, before = _content(output), _content(inputs)
    for number in _moments(clean.log):
        shutil.rmtree(place)
        place.mkdir()
        arguments = [str(place), str(number), *command.arguments, "-o", str(output)]
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, *arguments], capture_output=True, cwd=_ROOT, check=False
        )
        assert killed.returncode == -signal.SIGKILL
        assert _content(inputs) == before
        if output.is_dir():
            assert _content(output) == whole
            continue
        again = command.run(place)
        assert again.exit_code == 0, again.output
        assert _content(output) == whole
