"""Interrupted quantizations go on where they stopped, and end with the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmfast.bundle import stage_output
from llmfast.commit import staging_path
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.checkpoint import Checkpoint
from llmfast.quantize.stage import QuantizeOptions, quantize

# Dies as the kernel would kill it, in the middle of the layers.
_KILLED = """
import os, signal, sys
from pathlib import Path
from llmfast.cli import main
from llmfast.quantize.checkpoint import Checkpoint
keep, done = Checkpoint.keep_weight, []
def keep_and_die(self, name, weight):
    keep(self, name, weight)
    done.append(name)
    if len(done) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.keep_weight = keep_and_die
main()
"""


def _options(text: Path, **settings: object) -> QuantizeOptions:
    return QuantizeOptions("int4", "gptq", calibration=Calibration(text, 2, 64), **settings)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return path


def _kill_in_the_middle(source: Path, output: Path, text: Path, *more: str) -> Path:
    arguments = ["quantize", source, "-o", output, "--scheme", "int4", "--method", "gptq", "--calibration", text]
    arguments += ["--num-samples", "2", "--seq-len", "64", *more]
    command = [sys.executable, "-c", _KILLED, *map(str, arguments)]
    assert subprocess.run(command, capture_output=True).returncode == 6  # told by the parent
    pieces = output.parent / f".{output.name}.llmfast-resume"
    assert len(list(pieces.glob("*.npz"))) == 4
    assert not output.exists()
    return pieces


def test_a_killed_run_resumes_to_the_same_bytes(
    fp32_bundle: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(fp32_bundle, tmp_path / "whole", _options(text))
    pieces = _kill_in_the_middle(fp32_bundle, tmp_path / "out", text)
    from llmfast.quantize.rounding import gptq

    rounded = []
    original = gptq.quantize_weight
    monkeypatch.setattr(gptq, "quantize_weight", lambda *args: rounded.append(1) or original(*args))
    resumed = quantize(fp32_bundle, tmp_path / "out", _options(text, resume=True))
    assert "resuming with 4 layers that are done" in capsys.readouterr().err
    assert len(rounded) == 10 - 4
    for file in whole.path.iterdir():
        assert file.read_bytes() == (resumed.path / file.name).read_bytes(), file.name
    assert not pieces.exists()


def test_what_other_runs_stage_is_left_to_them(fp32_bundle: Path, tmp_path: Path, text: Path) -> None:
    _kill_in_the_middle(fp32_bundle, tmp_path / "out", text)
    staged = staging_path(tmp_path / "out")  # names this process, which lives
    staged.mkdir()
    quantize(fp32_bundle, tmp_path / "out", _options(text, resume=True))
    assert staged.is_dir()


def test_an_output_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    output = tmp_path / "out"
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    aside = tmp_path / f".out.llmfast-{nobody.pid}-0123abcd"
    (aside / "out").mkdir(parents=True)
    (aside / "out" / "model.onnx").write_bytes(b"old")
    os.utime(aside, (0, 0))
    Checkpoint(output, {}, resume=False)
    Checkpoint(output, {}, resume=True)
    with pytest.raises(ValueError, match="x"), stage_output(output, overwrite=True):
        raise ValueError("x")
    assert (output / "model.onnx").read_bytes() == b"old"


def test_damaged_pieces_are_made_again(
    fp32_bundle: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = _kill_in_the_middle(fp32_bundle, tmp_path / "out", text)
    next(pieces.glob("*.npz")).write_bytes(b"PK not an archive")
    resumed = quantize(fp32_bundle, tmp_path / "out", _options(text, resume=True))
    assert "is damaged" in capsys.readouterr().err
    whole = quantize(fp32_bundle, tmp_path / "whole", _options(text))
    assert resumed.model.read_bytes() == whole.model.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "whole"]


def test_pieces_of_another_run_are_not_used(
    fp32_bundle: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _kill_in_the_middle(fp32_bundle, tmp_path / "out", text)
    quantize(fp32_bundle, tmp_path / "out", _options(text, resume=True, settings={"block_size": "64"}))
    assert "from a run with another model or other options" in capsys.readouterr().err


def test_without_resume_a_run_begins_anew(
    fp32_bundle: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _kill_in_the_middle(fp32_bundle, tmp_path / "out", text)
    quantize(fp32_bundle, tmp_path / "out", _options(text))
    assert "resuming" not in capsys.readouterr().err
    quantize(fp32_bundle, tmp_path / "other", _options(text, resume=True))
    assert "nothing to resume" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith("resume")]


def test_damages_of_layers_are_kept_too(fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmfast.quantize import sensitivity
    from llmfast.quantize.budget import Budget

    options = {"budget": Budget(max_bits=6.0)}
    whole = quantize(fp32_bundle, tmp_path / "whole", QuantizeOptions("int4", **options))
    measured = []
    damage = sensitivity.WeightProbe.damage

    def interrupt(self: sensitivity.WeightProbe, *args: object) -> float:
        measured.append(args[0])
        if len(measured) == 5:
            raise KeyboardInterrupt
        return damage(self, *args)

    monkeypatch.setattr(sensitivity.WeightProbe, "damage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", **options))
    resumed = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", resume=True, **options))
    assert len(measured) == len(set(measured)) + 1  # only the interrupted one twice
    for file in whole.path.iterdir():
        assert file.read_bytes() == (resumed.path / file.name).read_bytes(), file.name
