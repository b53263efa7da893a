"""Every writer of the program on a disk that fails at every operation, and a process that dies at every one."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmfast.bundle import (
    Manifest,
    sha256,
    stage_file,
    stage_output,
    write_manifest,
)
from llmfast.cli import app
from llmfast.commit import sweep
from llmfast.verify import hash_files
from tests import tiny_decoder
from tests.faults.disk import FailingDisk, kill, raising

_MANIFEST = Manifest("text-generation", graphs={"model": {"file": "model.onnx", "inputs": [], "outputs": []}})
_MOST = 500  # operations of a writer, far more than any has
NEW, OLD = b"new" * 1000, b"old" * 1000


def _write_bundle(output: Path, content: bytes = NEW) -> None:
    with stage_output(output, overwrite=True) as staged:
        with (staged / "model.onnx").open("wb") as file:
            file.write(content[:1500])
            file.write(content[1500:])
        with (staged / "tokenizer.json").open("wb") as file:
            file.write(content)
        write_manifest(staged, _MANIFEST)


def _write_file(output: Path, content: bytes = NEW) -> None:
    with stage_file(output, overwrite=True) as staged, staged.open("wb") as file:
        file.write(content[:1500])
        file.write(content[1500:])


Writer = Callable[..., None]
WRITERS = {"directory": _write_bundle, "file": _write_file}


def _content(output: Path) -> bytes | None:
    """Return what an output holds, None when there is none; a directory must be as its manifest says."""
    if not output.exists():
        return None
    if output.is_file():
        return output.read_bytes()
    assert {row["verdict"] for row in hash_files(output)} == {"ok"}
    return (output / "model.onnx").read_bytes()


def _without_exchange(monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr("llmfast.commit.exchange", lambda *_: False)


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EDQUOT, errno.EFBIG]
)
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistent"])
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "aside"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failing_disk_leaves_the_old_or_the_new(
    writer: str, exchanges: bool, persistent: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows D1 and D2."""
    _without_exchange(monkeypatch, exchanges)
    write, output = WRITERS[writer], tmp_path / "output"
    for before in (None, OLD):
        for number in range(1, _MOST):
            if output.exists():
                shutil.rmtree(output) if output.is_dir() else output.unlink()
            if before:
                write(output, before)
            failure = None
            with FailingDisk(tmp_path, number, raising(code), persistent).active() as disk:
                try:
                    write(output)
                except Exception as error:
                    failure = error
            if before and not output.exists():
                # Moving the old one back failed as well; the next run does it.
                assert persistent
                assert not exchanges
                monkeypatch.setattr("llmfast.commit._STRAY_AGE_S", -1)
                monkeypatch.setattr("llmfast.commit._is_alive", lambda process: False)
                sweep(output)
                monkeypatch.undo()
                _without_exchange(monkeypatch, exchanges)
            assert _content(output) in (before, NEW)
            assert [path.name for path in tmp_path.iterdir()] == (["output"] if output.exists() else [])
            if not disk.reached:
                assert failure is None
                break
            if failure is not None:
                assert getattr(failure, "exit_code", None) == 6
                assert os.strerror(code) in str(failure)
        assert number > 6
        assert _content(output) == NEW


def _in_a_child(run: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "aside"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_process_leaves_the_old_or_the_new(
    writer: str, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row D3; what it had staged is removed by a later run, and an output moved aside comes back."""
    _without_exchange(monkeypatch, exchanges)
    monkeypatch.setattr("llmfast.commit._STRAY_AGE_S", -1)
    write, output = WRITERS[writer], tmp_path / "output"
    for number in range(1, _MOST):
        write(output, OLD)
        disk = FailingDisk(tmp_path, number, kill)

        def run(disk: FailingDisk = disk) -> None:
            with disk.active():
                write(output)

        code = _in_a_child(run)
        is_aside = writer == "directory" and not exchanges and not output.exists()
        assert is_aside or _content(output) in (OLD, NEW)
        with pytest.raises(ValueError, match="stop"), stage_output(output, overwrite=True):
            assert _content(output) in (OLD, NEW)  # the next run puts it back before it begins
            raise ValueError("stop")
        assert [path.name for path in tmp_path.iterdir()] == ["output"]
        if code == 0:
            break
    assert number > 6


def test_strays_of_living_or_recent_processes_are_left_alone(tmp_path: Path) -> None:
    alive = tmp_path / f".output.llmfast-{os.getppid()}-00000000"
    recent = tmp_path / ".output.llmfast-4194305-00000000"  # beyond the largest number of a process
    old = tmp_path / ".output.llmfast-4194305-11111111"
    resume = tmp_path / ".output.llmfast-resume"
    for stray in (alive, recent, old, resume):
        stray.mkdir()
        if stray != recent:
            os.utime(stray, (time.time() - 7200,) * 2)
    _write_bundle(tmp_path / "output")
    assert {path.name for path in tmp_path.iterdir()} == {"output", alive.name, recent.name, resume.name}


def _lose_power(log: list[tuple[str, ...]], contents: dict[str, bytes], torn: bool) -> dict[str, bytes]:
    """Return the files on the disk after a log of operations and a power cut.

    Args:
        log: what was done before it.
        contents: last path -> content of each file as written.
        torn: what was not synced is lost; otherwise names are there, and files empty.
    """
    synced = {entry[1] for entry in log if entry[0] == "fsync"}
    files: dict[str, bytes] = {}
    for name, path, *more in log:
        if name == "open":
            is_there = os.path.dirname(path) in synced or not torn
            if is_there:
                files[path] = contents[os.path.basename(path)] if path in synced else b""
        elif name in ("rename", "exchange", "replace") and (
            os.path.dirname(more[0]) in _synced_after(log, path) or not torn
        ):
            moved = {old: data for old, data in files.items() if old == path or old.startswith(path + os.sep)}
            files = {old: data for old, data in files.items() if old not in moved}
            files |= {more[0] + old[len(path) :]: data for old, data in moved.items()}
    return files


def _synced_after(log: list[tuple[str, ...]], renamed: str) -> set[str]:
    position = max(index for index, entry in enumerate(log) if entry[0] != "fsync" and entry[1] == renamed)
    return {entry[1] for entry in log[position:] if entry[0] == "fsync"}


@pytest.mark.parametrize("torn", [False, True], ids=["names-kept", "names-lost"])
def test_a_power_cut_never_leaves_a_mixture(torn: bool, tmp_path: Path) -> None:
    """Row D4: replay the log of one run, cut anywhere, without what was not synced."""
    output = tmp_path / "output"
    with FailingDisk(tmp_path, _MOST, kill).active() as disk:
        _write_bundle(output)
    contents = {path.name: path.read_bytes() for path in output.iterdir()}
    for length in range(len(disk.log) + 1):
        files = _lose_power(disk.log[:length], contents, torn)
        found = {name: data for name, data in files.items() if os.path.dirname(name) == str(output)}
        assert found in ({}, {str(output / name): data for name, data in contents.items()})
    assert found


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistent"])
def test_commands_on_a_failing_disk(persistent: bool, tmp_path: Path) -> None:
    """Rows D1 and D2 with the writers as they are: a graph, its companions, a manifest."""
    (tmp_path / "decoder").mkdir()
    model = tiny_decoder.write_bundle(tmp_path / "decoder")
    before = {path.name: sha256(path) for path in model.iterdir()}
    place = tmp_path / "place"
    place.mkdir()
    arguments = ["quantize", str(model), "-o", str(place / "output"), "--scheme", "int8", "--no-measure"]
    for number in range(1, _MOST):
        with FailingDisk(place, number, raising(errno.ENOSPC), persistent).active() as disk:
            result = CliRunner().invoke(app, arguments)
        assert {path.name: sha256(path) for path in model.iterdir()} == before
        if result.exit_code == 0:
            assert disk.log[-1][0] == "fsync"
        else:
            assert result.exit_code == 6, result.output
            assert result.stderr.count("error: ") == 1
            assert "No space left on device" in result.stderr
            assert "Traceback" not in result.output
        found = os.listdir(place)
        # When nothing but the sync of the rename itself failed, the output is there, and whole.
        assert found == ["output"] if result.exit_code == 0 else found in ([], ["output"])
        if found:
            assert {row["verdict"] for row in hash_files(place / "output")} == {"ok"}
        shutil.rmtree(place / "output", ignore_errors=True)
        if not disk.reached:
            break
    assert number > 15


def test_bills_of_materials_on_a_failing_disk(tmp_path: Path) -> None:
    (tmp_path / "decoder").mkdir()
    model = tiny_decoder.write_bundle(tmp_path / "decoder")
    place = tmp_path / "place"
    place.mkdir()
    for number in range(1, _MOST):
        with FailingDisk(place, number, raising(errno.EIO)).active() as disk:
            result = CliRunner().invoke(app, ["verify", str(model), "--sbom", str(place / "bom.json")])
        files = [path for path in place.iterdir()]
        assert [path.name for path in files] in ([], ["bom.json"])
        assert result.exit_code == (0 if not disk.reached else 6), result.output
        for file in files:
            assert json.loads(file.read_text())["bomFormat"] == "CycloneDX"
            file.unlink()
        if not disk.reached:
            break


def test_all_output_goes_through_the_one_writer() -> None:
    """Row D2: whoever opens a file to write must be among those that write into a staged path."""
    import ast

    import llmfast

    root = Path(llmfast.__file__).parent
    writes = {"write_text", "write_bytes", "copyfile", "save_pretrained", "savez"}
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            opens = name == "open" and any(
                isinstance(mode, str) and mode.strip("bt+") in ("w", "x", "a") for mode in modes
            )
            if opens or name in writes:
                found.add(path.relative_to(root).as_posix())
    assert found == _WRITERS, found ^ _WRITERS


# Each of these writes into a directory or file that `stage_output` or `stage_file` yields; the second list has what
# is read again after a crash, files that bench shares with its own workers, and /dev/null.
_WRITERS = {
    "bench/document.py",
    "bench/junit.py",
    "bench/webpage/page.py",
    "bundle.py",
    "commands/verify.py",
    "export/checkpoint.py",
    "export/gguf_checkpoint.py",
    "export/gguf_tokenizer.py",
    "export/pickle_checkpoint.py",
    "export/seq2seq_settings.py",
    "graph/weights.py",
    "lineage.py",
    "prune/checkpoint/files.py",
    "prune/graph/stage.py",
    "quantize/sensitivity.py",
    "quantize/stage.py",
    "quantize/vocabulary.py",
    "tasks/_embeddings.py",
    "tuned.py",
    "tune/stage.py",
    "tune/student.py",
} | {
    "cli.py",
    "infer/cluster/parts.py",
    "infer/jsonl.py",
    "quantize/checkpoint.py",
    "tune/curves.py",
    "tune/parallel.py",
    "tune/snapshots.py",
}
