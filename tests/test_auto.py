"""`quantize --auto`: what is tried where, and what is kept."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmfast import auto
from llmfast.auto import AutoOptions, Candidate, candidates, quantize_best
from llmfast.bench.result import Benchmark, Row
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, OutputExistsError, UnsupportedError
from llmfast.export.stage import export
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.plan import Plan
from llmfast.quantize.stage import QuantizeOptions
from llmfast.verdict import Gate
from tests.tiny_encoder import save_encoder


def _options(*gates: Gate) -> AutoOptions:
    return AutoOptions(QuantizeOptions("int4", calibration=Calibration(num_samples=2, seq_len=64)), gates)


def _row(bundle: str, figures: dict[str, float]) -> Row:
    return Row(bundle, "text-generation", "cpu", 1, {}, None, {}, [], figures, {}, {}, {}, {})


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Prefill and decode ratios by candidate, in place of a benchmark: what is fast here is not for a test to say."""
    ratios: dict[str, tuple[float, float]] = {}

    def bench(models: list[Path], options: Any) -> Benchmark:
        rows = [_row("fp32", {"size_bytes": 1})]
        for model in models[1:]:
            bundle = ModelBundle.open(model)  # whole, with a manifest
            prefill, decode = ratios[bundle.name]
            figures = {"prefill_tokens_per_s_ratio": prefill, "decode_tokens_per_s_ratio": decode, "tpot_s_ratio": 9.0}
            rows.append(_row(bundle.name, {"size_bytes": bundle.size_bytes, **figures}))
        return Benchmark({}, {}, [], "fp32", rows, [])

    monkeypatch.setattr(auto, "bench", bench)
    monkeypatch.setattr(auto, "describe_machine", lambda: {"cpu": "a", "cores": 2, "isa": ["avx512_vnni"]})
    return ratios


def test_candidates_depend_on_the_task() -> None:
    names = [one.name for one in candidates("text-generation", "cpu")]
    assert names == ["int8-smoothquant", "int4-gptq", "w8-rtn"]
    assert [one.name for one in candidates("feature-extraction", "cpu")] == ["int8-rtn"]


def test_candidates_of_gpus_multiply_in_half_precision() -> None:
    chosen = candidates("text-generation", "cuda")
    plans = [Plan.make(one.scheme, one.method, one.settings) for one in chosen]
    assert [one.name for one in chosen] == ["fp16-rtn", "int4-gptq"]
    assert plans[0].options == {"fp16": {"compute": "float16"}}


def test_the_fastest_that_passes_is_kept(fp32_bundle: Path, tmp_path: Path, speeds: dict) -> None:
    speeds |= {"int8-smoothquant": (2.0, 2.0), "int4-gptq": (0.5, 3.0), "w8-rtn": (1.1, 1.1)}
    rows: list[dict] = []
    bundle = quantize_best(fp32_bundle, tmp_path / "out", _options(), rows.extend)
    assert bundle.manifest.lineage[-1].method == "int8:smoothquant,rtn"
    assert [row["verdict"] for row in rows] == ["kept", "passed", "passed"]
    assert rows[1]["speed_ratio"] == pytest.approx(1.5**0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(path.is_file() for path in bundle.path.iterdir())

    # With a gate on speed that only one keeps, that one.
    with pytest.raises(OutputExistsError):
        quantize_best(fp32_bundle, tmp_path / "out", _options(), rows.extend)
    gated = _options(Gate("decode_tokens_per_s_ratio", 2.5, "min"))
    bundle = quantize_best(fp32_bundle, tmp_path / "two", gated, rows.extend)
    assert bundle.manifest.lineage[-1].method == "int4:gptq"


def test_fp32_is_kept_when_nothing_is_better(fp32_bundle: Path, tmp_path: Path, speeds: dict) -> None:
    speeds |= {"int8-smoothquant": (0.9, 0.9), "int4-gptq": (2.0, 2.0), "w8-rtn": (1.0, 1.0)}
    rows: list[dict] = []
    with pytest.raises(GateError, match=r"keep `fp32`.*`int8-smoothquant`: 0.90 x the speed.*`int4-gptq`: kld 0"):
        quantize_best(fp32_bundle, tmp_path / "out", _options(Gate("kld", 0.01, "max")), rows.extend)
    assert [row["verdict"].split(",")[-1] for row in rows] == [
        " asked more than 1",
        " asked at most 0.01",
        " asked more than 1",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_task_has_no_speed(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    bundle = export(str(tmp_path / "encoder"), tmp_path / "fp32")
    with pytest.raises(UnsupportedError, match="does not say what its model is for"):
        quantize_best(bundle.model, tmp_path / "out", _options(), list)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--auto", "--scheme", "int8"],
        ["--auto", "--target-bits", "5"],
        ["--auto", "--no-measure"],
        ["--scheme", "int8", "--min-speedup", "decode_tokens_per_s=1"],
        ["--scheme", "int8", "--threads", "2"],
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], fp32_bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(fp32_bundle), "-o", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2, result.output
    assert "--auto" in result.stderr


def test_gates_are_checked_before_and_measured_after(
    fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A speed that does not exist is said at once; one that does is measured, however long the model's context is."""
    output = tmp_path / "out"
    arguments = ["quantize", str(fp32_bundle), "-o", str(output), "--auto", "--num-samples", "1", "--seq-len", "64"]
    wrong = CliRunner().invoke(app, [*arguments, "--min-speedup", "decode=2"])
    assert wrong.exit_code == 2
    assert "no speed of this run" in wrong.stderr
    assert "trying" not in wrong.stderr
    monkeypatch.setattr(auto, "candidates", lambda *_: [Candidate("w8", "rtn")])
    missed = CliRunner().invoke(app, [*arguments, "--min-speedup", "decode_tokens_per_s=1000"])
    assert missed.exit_code == 7, missed.output
    assert re.search(r"keep `fp32`.*decode_tokens_per_s_ratio \d.*asked at least 1000", missed.stderr)


def test_encoders_are_gated_by_what_they_are_compared_by(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", max_position_embeddings=64)
    bundle = export(str(tmp_path / "encoder"), tmp_path / "fp32")
    arguments = ["quantize", str(bundle.path), "-o", str(tmp_path / "out"), "--auto"]
    result = CliRunner().invoke(app, [*arguments, "--max-kld", "1"])
    assert result.exit_code == 7
    assert "`kld` is not measured: the answers of this model are compared by cosine" in result.stderr
    result = CliRunner().invoke(app, [*arguments, "--min-speedup", "samples_per_s=1000"])
    assert result.exit_code == 7, result.output
    for shape in ("1x32", "8x64"):  # 128 do not fit
        assert re.search(rf"samples_per_s_{shape}_ratio \d", result.stderr)


def test_command_measures_for_real(fp32_bundle: Path, tmp_path: Path) -> None:
    """A tiny model gains nothing for sure, so either end is right; which one depends on the machine."""
    arguments = ["quantize", str(fp32_bundle), "-o", str(tmp_path / "out"), "--auto", "--num-samples", "1"]
    result = CliRunner().invoke(app, [*arguments, "--seq-len", "64"])
    assert result.exit_code in (0, 7), result.output
    assert ("kept" in result.stdout) == (tmp_path / "out").exists() == (result.exit_code == 0)
    assert "int8-smoothquant" in result.stdout  # the table, also when nothing is kept
    assert "trying" in result.stderr
    assert "speed only" not in result.stderr  # bench's own note
