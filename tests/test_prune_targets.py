"""Pruning to a number of parameters or to a speed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmfast.errors import GateError, OptionError, OutputExistsError
from llmfast.prune import speedup
from llmfast.prune.checkpoint import stage
from llmfast.prune.methods import choose_methods
from llmfast.prune.options import parse_factor, parse_params, parse_ratio
from llmfast.prune.speedup import prune_to_speed
from llmfast.prune.stage import plan, prune
from tests.tiny_prune import load_decoder, options_of


def test_a_target_is_met_by_the_least_that_does(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = str(checkpoints("llama-tied"))
    measured = prune(source, tmp_path / "pruned", options_of("heads,ffn", target_params=0.7)).document()
    before, after = (row["num_parameters"] for row in measured["rows"])
    channel_step = 8 * 3 * 64 * 2
    assert 0.7 * before - channel_step < after <= 0.7 * before
    with pytest.raises(OptionError, match="at least"):
        plan(source, tmp_path / "x", options_of("ffn", target_params=0.3))


def test_a_target_is_divided_by_what_is_lost(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of("heads,ffn", target_params=0.75, allocation="sensitivity")
    measured = prune(str(checkpoints("llama-tied")), tmp_path / "pruned", options).document()
    lines = [line for line in capsys.readouterr().err.splitlines() if "parameters, loss " in line]
    losses = {line.partition(":")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert len(losses) >= 2
    best = min(losses, key=lambda name: losses[name])
    assert best == ", ".join(f"{name} {ratio:.1%}" for name, ratio in measured["ratios"].items())


def test_the_two_parts_of_the_calibration_text_do_not_overlap(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven: list[bytes] = []
    probed: list[bytes] = []

    class Proof(stage.Proof):
        def __init__(self, checkpoint: Any, task: str, samples: list[Any]) -> None:
            proven.extend(one.tobytes() for one in samples)
            super().__init__(checkpoint, task, samples)

    def prune_part(workpiece: Any, *others: Any) -> Any:
        probed.extend(one.tobytes() for one in workpiece.samples)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "Proof", Proof)
    monkeypatch.setattr(stage, "_prune", prune_part)
    source = str(checkpoints("llama-tied"))
    options = options_of("heads,ffn", target_params=0.75, allocation="sensitivity", measure=False)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "pruned", options)
    assert (len(proven), len(probed)) == (4, 2)
    assert not set(proven) & set(probed)
    few = replace(options, calibration=replace(options.calibration, num_samples=4))
    with pytest.raises(OptionError, match="4 samples of the calibration text do not make two parts"):
        prune(source, tmp_path / "pruned", few)


class _FakeTimes:
    """Speeds that follow from the sizes alone."""

    def __init__(self, source: Path, *_: Any) -> None:
        self._before = self._cost(source)

    def __enter__(self) -> "_FakeTimes":
        return self

    def __exit__(self, *_: Any) -> None: ...

    @staticmethod
    def _cost(folder: Path) -> float:
        return 1e5 + sum(parameter.numel() for parameter in load_decoder(folder).parameters())

    def measure(self, folder: Path) -> dict[str, float]:
        ratio = self._before / self._cost(folder)
        return {"prefill_tokens_per_s_ratio": ratio, "decode_tokens_per_s_ratio": ratio * 1.1}


def test_a_speed_is_reached_by_measuring(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedup, "SpeedTest", _FakeTimes)
    monkeypatch.setattr("llmfast.prune.checkpoint.stage.SpeedTest", _FakeTimes)
    source = str(checkpoints("llama-tied"))
    measured = prune_to_speed(source, tmp_path / "fast", options_of("layers,ffn"), 1.15).document()
    speed = measured["rows"][1]["prefill_tokens_per_s_ratio"]
    assert speed >= 1.15
    assert speed == pytest.approx(_FakeTimes(Path(source)).measure(tmp_path / "fast")["prefill_tokens_per_s_ratio"])
    assert {entry["figure"] for entry in measured["gates"]} == set(_FakeTimes(Path(source)).measure(Path(source)))
    with pytest.raises(GateError, match="3 times as fast"):
        prune_to_speed(source, tmp_path / "x", options_of("ffn"), 3)
    with pytest.raises(OptionError, match="makes nothing faster"):
        prune_to_speed(source, tmp_path / "x", options_of("wanda"), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast"]


def test_an_output_is_refused_before_anything_is_timed(
    checkpoints: Callable[[str], Path], own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(speedup, "SpeedTest")
    source = str(checkpoints("llama-tied"))
    before = {file.name: file.read_bytes() for file in own_checkpoint.iterdir()}
    with pytest.raises(OutputExistsError, match="output exists"):
        prune_to_speed(source, own_checkpoint, options_of("ffn"), 1.1)
    with pytest.raises(OutputExistsError, match="not an llmfast bundle"):
        prune_to_speed(source, own_checkpoint, options_of("ffn", overwrite=True), 1.1)
    with pytest.raises(OptionError, match="overlaps the input"):
        prune_to_speed(str(own_checkpoint), own_checkpoint, options_of("ffn", overwrite=True), 1.1)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(OptionError, match="is an ONNX model"):
        prune_to_speed(str(tmp_path / "model.onnx"), tmp_path / "x", options_of("ffn"), 1.1)
    assert {file.name: file.read_bytes() for file in own_checkpoint.iterdir()} == before


def test_typed_numbers() -> None:
    assert parse_ratio("layers=0.1, ffn=0.3") == {"layers": 0.1, "ffn": 0.3}
    assert parse_params("100M") == 1e8
    assert parse_params("75%") == 0.75
    assert parse_params("1.5b") == 1.5e9
    assert parse_factor("1.3x") == 1.3
    assert [one.name for one in choose_methods(options_of("vocabulary,ffn", ratios={"": 0.1}))[1]] == [
        "ffn",
        "vocabulary",
    ]
