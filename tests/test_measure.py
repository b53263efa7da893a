"""The comparison with the float model after each quantization, and its gates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, InputError, OptionError
from llmfast.export.stage import export
from llmfast.infer.engine import Engine
from llmfast.quantize.budget import Budget
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.comparison import Comparison
from llmfast.quantize.measure import HIGHER_IS_BETTER, SEQ_LEN
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.tokenizer import Tokenizer
from llmfast.verdict import Gate, parse_drop
from tests.tiny_encoder import save_encoder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = np.random.default_rng(3).integers(97, 123, 2 * SEQ_LEN + 10).astype(np.uint8)
    path.write_bytes(letters.tobytes())
    return path


def test_figures_are_those_of_a_plain_computation(fp32_bundle: Path, text: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", data=text, data_samples=2))
    measured = bundle.manifest.measured["quantize"]
    ids = np.array(Tokenizer.load(fp32_bundle).encode(text.read_text()))[: 2 * SEQ_LEN].reshape(2, SEQ_LEN)
    theirs, ours = Engine(ModelBundle.open(fp32_bundle)), Engine(bundle)
    gaps, agreements, extra = [], [], []
    for window in ids:
        p, q = (np.exp(one.score(window)[:-1].astype(np.float64)) for one in (theirs, ours))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        gaps.append((p * np.log(p / q)).sum(-1))
        agreements.append(p.argmax(-1) == q.argmax(-1))
        rows = np.arange(SEQ_LEN - 1)
        extra.append(np.log(p[rows, window[1:]] / q[rows, window[1:]]))
    assert measured["kld"] == pytest.approx(np.mean(gaps), rel=1e-2)
    assert measured["top1_agreement"] == pytest.approx(np.mean(agreements), abs=0.02)
    assert measured["perplexity_ratio"] == pytest.approx(np.exp(np.mean(extra)), rel=1e-2)
    assert measured["text"] == {"name": "text.txt", "sha256": measured["text"]["sha256"], "num_samples": 2}
    worst = measured["worst_layers"]
    assert [one["output_error"] for one in worst] == sorted((one["output_error"] for one in worst), reverse=True)
    assert all(0.01 < one["output_error"] < 0.3 for one in worst)


def test_held_out_text_is_what_calibration_left(fp32_bundle: Path, tmp_path: Path) -> None:
    lines = "".join(chr(97 + index % 26) for index in range(4 * 64))
    text = tmp_path / "text.txt"
    text.write_text(lines, encoding="utf-8")

    def held_out(samples: int) -> dict:
        options = QuantizeOptions("int4", "gptq", calibration=Calibration(text, samples, 64), overwrite=True)
        return quantize(fp32_bundle, tmp_path / "out", options).manifest.measured["quantize"]["text"]

    assert held_out(1)["name"] == "text.txt"
    assert held_out(1)["num_samples"] >= 2
    assert "held_out.txt" in held_out(4)["name"]  # nothing is left


def test_encoders_are_compared_by_their_vectors(tmp_path: Path) -> None:
    save_encoder(tmp_path / "checkpoint")
    fp32 = export(str(tmp_path / "checkpoint"), tmp_path / "fp32")
    small = quantize(fp32.path, tmp_path / "int8", QuantizeOptions("int8"))
    measured = small.manifest.measured["quantize"]
    assert 0.99 < measured["cosine"] < 1
    gates = (parse_drop("cosine=0.0000001", HIGHER_IS_BETTER),)
    with pytest.raises(GateError, match="`strict` cosine"):
        quantize(fp32.path, tmp_path / "strict", QuantizeOptions("int4", gates=gates))
    assert not (tmp_path / "strict").exists()


def test_labels_that_hold_on_their_own_are_compared_on_their_own() -> None:
    rng = np.random.default_rng(0)
    theirs, ours = rng.normal(size=(2, 4, 5)).astype(np.float32) * 2
    comparison = Comparison(["logits"], predicts_tokens=False, problem_type="multi_label_classification")
    comparison.add({}, [ours], [theirs])
    p, q = (1 / (1 + np.exp(-one.astype(np.float64))) for one in (theirs, ours))
    kld = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert comparison.figures() == {
        "kld": pytest.approx(kld.mean()),
        "flipped_labels": pytest.approx(((p > 0.5) != (q > 0.5)).mean()),
    }


@pytest.mark.parametrize(("width", "problem_type"), [(1, ""), (1, "multi_label_classification"), (3, "regression")])
def test_scores_are_compared_by_their_error(width: int, problem_type: str) -> None:
    theirs, ours = np.random.default_rng(0).normal(size=(2, 4, width)).astype(np.float32)
    comparison = Comparison(["logits"], predicts_tokens=False, problem_type=problem_type)
    comparison.add({}, [ours], [theirs])
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert comparison.figures() == {"relative_error": pytest.approx(error, rel=1e-6)}


def test_a_budget_of_a_ranker_is_divided_by_the_error_of_its_scores(heads: Callable[..., Any], tmp_path: Path) -> None:
    source = heads("text-ranking").bundle.path
    bundle = quantize(source, tmp_path / "out", QuantizeOptions("int4", budget=Budget(max_bits=10)))
    measured = bundle.manifest.measured["quantize"]
    assert "kld" not in measured
    assert 0 < measured["relative_error"] < 0.5
    damages = json.loads((bundle.path / "sensitivity.json").read_text())["layers"]
    assert all(row["damage"] > 0 for row in damages if row["name"].endswith(("query", "value", "dense")))
    with pytest.raises(GateError, match="relative_error"):
        quantize(
            source,
            tmp_path / "x",
            QuantizeOptions("int4", gates=(parse_drop("relative_error=0.000001", HIGHER_IS_BETTER),)),
        )


def _graph(path: Path, input_type: int = TensorProto.FLOAT, is_argmax: bool = False) -> Path:
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 32])
    if is_argmax:
        nodes.append(helper.make_node("ArgMax", ["y"], ["label"], axis=1, keepdims=0))
        output = helper.make_tensor_value_info("label", TensorProto.INT64, ["rows"])
    graph = helper.make_graph(
        nodes,
        "lone",
        [helper.make_tensor_value_info("x", input_type, ["rows", 64])],
        [output],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_graph_without_text_is_compared_on_random_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _graph(tmp_path / "lone.onnx")
    bundle = quantize(source, tmp_path / "out", QuantizeOptions("int4"))
    measured = bundle.manifest.measured["quantize"]
    assert "random inputs" in capsys.readouterr().err
    assert measured["text"] is None
    x = np.random.default_rng(9).standard_normal((500, 64)).astype(np.float32)
    theirs, ours = (onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for path in (source, bundle.model))
    expected = np.linalg.norm(theirs - ours) / np.linalg.norm(theirs)
    assert measured["relative_error"] == pytest.approx(expected, rel=0.25)


def test_a_graph_that_refuses_random_inputs_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _graph(tmp_path / "lone.onnx", TensorProto.STRING)
    bundle = quantize(source, tmp_path / "out", QuantizeOptions("int4"))
    assert "not compared with the float model" in capsys.readouterr().err
    assert "relative_error" not in bundle.manifest.measured["quantize"]
    with pytest.raises(GateError, match="not measured"):
        quantize(source, tmp_path / "gated", QuantizeOptions("int4", gates=(Gate("kld", 1, "max"),)))


def test_a_graph_without_float_outputs_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _graph(tmp_path / "labels.onnx", is_argmax=True)
    bundle = quantize(source, tmp_path / "out", QuantizeOptions("int4"))
    assert "`labels.onnx` can't be compared with the float model" in capsys.readouterr().err
    assert not {"relative_error", "kld"} & set(bundle.manifest.measured["quantize"])
    with pytest.raises(GateError, match="not measured"):
        quantize(source, tmp_path / "gated", QuantizeOptions("int4", gates=(Gate("relative_error", 1, "max"),)))


def test_a_missed_gate_leaves_nothing(fp32_bundle: Path, text: Path, tmp_path: Path) -> None:
    gates = (Gate("kld", 1e-6, "max"), parse_drop("top1_agreement=0", HIGHER_IS_BETTER))
    with pytest.raises(GateError, match=r"`out` kld 0\.\d+, asked at most 1e-06; `out` top1_agreement"):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", data=text, gates=gates))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("drop", ["", "top1_agreement", "top1_agreement=x", "accuracy=1", "cosine=-1=2"])
def test_malformed_drops_are_refused(drop: str) -> None:
    with pytest.raises(OptionError, match="--max-drop"):
        parse_drop(drop, HIGHER_IS_BETTER)


def test_drops_are_limits() -> None:
    assert parse_drop("top1_agreement=5", HIGHER_IS_BETTER) == Gate("top1_agreement", 0.95, "min")
    assert parse_drop("cosine=0.01", HIGHER_IS_BETTER) == Gate("cosine", 0.99, "min")
    assert parse_drop("flipped_labels=2", HIGHER_IS_BETTER) == Gate("flipped_labels", 0.02, "max")
    assert parse_drop("relative_error=0.1", HIGHER_IS_BETTER) == Gate("relative_error", 0.1, "max")


def test_gates_without_a_comparison_are_refused(text: Path) -> None:
    for options in ({"gates": (Gate("kld", 1, "max"),)}, {"data": text}):
        with pytest.raises(OptionError, match="--no-measure"):
            QuantizeOptions("int4", measure=False, **options)
    with pytest.raises(OptionError, match="--data-samples 0"):
        QuantizeOptions("int4", data_samples=0)


def test_bad_data_is_found_before_the_work(fp32_bundle: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match="text too short"):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", data=short))
    assert not (tmp_path / "out").exists()


def test_command_prints_figures_and_exits_with_7(
    checkpoints: Callable[[str], Path], fp32_bundle: Path, tmp_path: Path
) -> None:
    def run(*arguments: str):
        return CliRunner().invoke(app, ["quantize", str(fp32_bundle), "-o", str(tmp_path / "out"), *arguments])

    result = run("--scheme", "int8", "--max-kld", "0.5", "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["kld"] < 0.5
    assert document["size_bytes"] == ModelBundle.open(tmp_path / "out").size_bytes
    assert document["gates"][0]["passed"]
    result = run("--scheme", "int4", "--max-drop", "top1_agreement=0", "--overwrite")
    assert result.exit_code == 7
    assert "top1_agreement" in result.stderr
    assert ModelBundle.open(tmp_path / "out").manifest.lineage[-1].method == "int8:rtn"  # as it was before
    result = run("--scheme", "int4", "--no-measure", "--overwrite", "--format", "md")
    assert result.exit_code == 0, result.output
    assert "KLD" not in result.stdout
