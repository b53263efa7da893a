"""Every row of the table of faults: exit code, words, time, memory, and nothing lost or left."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmfast.cli import app
from llmfast.files import ALLOW_HARDLINKS
from llmfast.resources import FORCE
from tests import test_cli, tiny_decoder
from tests.faults import content, data, environment, files, graphs, test_commit, test_environment, test_race  # noqa: F401 - their rows are in the table once they are imported
from tests.faults.table import FAULTS, MAX_BYTES, MAX_CPU_S, Fault, Place


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.write_bundle(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def place(tmp_path: Path, decoder: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Place:
    folder = tmp_path / "place"
    folder.mkdir()
    for name in (ALLOW_HARDLINKS, FORCE):
        monkeypatch.setenv(name, "")  # the command line sets them for the rest of the process
    canary = tmp_path / "canary"
    canary.write_bytes(b"\0" * 4 * graphs.SIZE**2)
    return Place(folder, canary, decoder, lambda: checkpoints("llama-tied"), monkeypatch)


def _snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and content of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and path.stat().st_size < 1 << 24
        found[str(path)] = path.lstat().st_mtime_ns, path.read_bytes() if is_file else b""
    return found


def _run(fault: Fault, arguments: list[str], folder: Path) -> tuple[int, str, str]:
    if not fault.alone:
        before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = CliRunner().invoke(app, arguments)
        if fault.exit != 7:  # a gate is judged after all the work
            assert time.process_time() - before[0] <= MAX_CPU_S
        if fault.exit:
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] <= MAX_BYTES >> 10
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr
    command = [sys.executable, "-m", "llmfast", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=folder)
    return done.returncode, done.stdout, done.stderr


_opened: set[str] = set()


def _watch(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        _opened.add(os.path.abspath(arguments[0]))


sys.addaudithook(_watch)  # it can't be taken away again


# Rows that take more than one run of a command, or more than one process: the tests that hold them.
_TESTS = {
    "B5": test_race.test_a_file_swapped_for_a_link_is_never_read,
    "D3": test_commit.test_a_killed_process_leaves_the_old_or_the_new,
    "D4": test_commit.test_a_power_cut_never_leaves_a_mixture,
    "D5": test_environment.test_a_signal_ends_the_work_in_time,
    "D6": test_environment.test_the_work_ends_with_its_parent,
    "D7": test_environment.test_too_little_memory_is_told,
    "D8": test_environment.test_a_crash_in_native_code_is_told_and_leaves_nothing,
    "D12": test_environment.test_of_two_runs_with_one_output_one_wins_whole,
    "D13": test_environment.test_odd_surroundings_are_no_fault,
    "D16": test_cli.test_full_output_is_a_resource_error,
    "D19": test_environment.test_a_damaged_piece_of_an_interrupted_run_is_made_again,
    "D20": test_environment.test_no_command_uses_the_network,
}
_ROWS = {"A": 23, "B": 17, "C": 17, "D": 20}


def test_every_row_is_held() -> None:
    rows = {f"{part}{number}" for part, count in _ROWS.items() for number in range(1, count + 1)}
    assert rows == {fault.row for fault in FAULTS} | _TESTS.keys()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(fault: Fault, place: Place) -> None:
    arguments = [str(argument) for argument in fault.make(place)]
    before = _snapshot(place.folder)
    _opened.clear()
    code, out, errors = _run(fault, arguments, place.folder / fault.inside)
    assert str(place.canary) not in _opened
    place.patch.undo()
    assert code == fault.exit, errors
    assert "Traceback" not in out + errors
    for word in fault.says:
        assert word in errors
    written = {name for name in _snapshot(place.folder) if name.startswith(str(place.output))}
    assert bool(written) == fault.writes
    after = _snapshot(place.folder)
    assert place.changes or {name: after[name] for name in after.keys() - written} == before
    assert [name for name in os.listdir(place.folder) if ".llmfast-" in name] == []
    if fault.exit:
        lines = errors.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert sum(line.startswith("hint: ") for line in lines) <= 1
        assert place.canary.read_bytes() == b"\0" * 4 * graphs.SIZE**2
        assert out == ""
        assert all(char.isprintable() or char == "\n" for char in errors)
    shutil.rmtree(place.folder)
