"""Half precision: what is stored, what is kept in float32, and products in float16, against PyTorch."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.graph.builder import GraphBuilder
from llmfast.graph.floats import FloatFormat, write_float_linear, write_half_linear
from llmfast.graph.linear import find_linears
from llmfast.graph.model import OnnxModel
from llmfast.graph.weights import WeightFile
from llmfast.infer.engine import Engine
from llmfast.inspect.stage import inspect
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize

FORMATS = {"fp16": "float16", "bf16": "bfloat16"}
DOWN = "model.layers.1.mlp.down_proj"
TABLE = "model.embed_tokens"


def _edited(bundle: Path, output: Path, name: str, change: Any) -> Path:
    """Return a copy of a bundle with one weight changed."""
    shutil.copytree(bundle, output)
    model = onnx.load(output / "model.onnx")
    tensor = next(one for one in model.graph.initializer if one.name == f"{name}.weight")
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(model, output / "model.onnx")
    return output


def _weights(bundle: Path) -> dict[str, np.ndarray]:
    model = OnnxModel.load(ModelBundle.open(bundle).model)
    return {name: np.array(model.read(tensor)) for name, tensor in model.initializers.items()}


@pytest.mark.parametrize("scheme", FORMATS)
def test_weights_are_rounded_to_nearest_even_and_stored_once(scheme: str, fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme))
    before, after = _weights(fp32_bundle), _weights(bundle.path)
    linears = find_linears(OnnxModel.load(fp32_bundle / "model.onnx"))
    rounded = {linear.weight for linear in linears}
    assert f"{TABLE}.weight" in rounded  # the tied head's
    name = FORMATS[scheme]
    for weight in rounded:
        expected = torch.from_numpy(before.pop(weight)).to(getattr(torch, name)).view(torch.int16).numpy()
        np.testing.assert_array_equal(after.pop(f"{weight}.{name}").view(np.int16), expected)
    assert after.keys() == before.keys()
    for key, value in before.items():  # norms and tables of positions
        np.testing.assert_array_equal(after[key], value)
    assert bundle.manifest.bits_per_weight == pytest.approx(16, abs=0.2)
    assert bundle.manifest.lineage[-1].options.keys() == {"include", "exclude", scheme}


@pytest.mark.parametrize("scheme", FORMATS)
def test_answers_are_those_of_the_rounded_weights(scheme: str, fp32_bundle: Path, tmp_path: Path) -> None:
    """The same float32 computation, bit for bit; so what was bfloat16 before loses nothing."""
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme))
    rounded = {linear.weight for linear in find_linears(OnnxModel.load(fp32_bundle / "model.onnx"))}
    model = onnx.load(fp32_bundle / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name in rounded:
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(getattr(torch, FORMATS[scheme]))
            tensor.CopyFrom(numpy_helper.from_array(values.float().numpy(), tensor.name))
    shutil.copytree(fp32_bundle, tmp_path / "rounded")
    onnx.save(model, tmp_path / "rounded" / "model.onnx")
    ids = np.random.default_rng(0).integers(3, 259, 48)
    expected = Engine(ModelBundle.open(tmp_path / "rounded"), threads=1).score(ids)
    np.testing.assert_array_equal(Engine(bundle, threads=1).score(ids), expected)
    again = quantize(tmp_path / "rounded", tmp_path / "again", QuantizeOptions(scheme))
    assert {row["relative_error"] for row in again.manifest.measured["quantize"]["layers"]} == {0.0}


def test_a_table_may_stay_float_beside_its_head(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("fp16", exclude="embedding|_proj"))
    stored = _weights(bundle.path)
    assert f"{TABLE}.weight" in stored
    assert f"{DOWN}.weight" in stored
    ids = np.random.default_rng(0).integers(3, 259, 48)
    expected = Engine(ModelBundle.open(fp32_bundle)).score(ids)
    np.testing.assert_allclose(Engine(bundle).score(ids), expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("scheme", FORMATS)
def test_inspect_shows_the_format(scheme: str, fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme))
    document = inspect(bundle.path).document()
    rows = {row["role"]: row for row in document["graphs"][0]["layers"]}
    for role in ("embedding", "qkv_proj", "down_proj"):
        assert (rows[role]["weights"], rows[role]["bits"]) == (FORMATS[scheme], 16)
        assert rows[role]["activations"] == "float32"
    assert rows["norm"]["weights"] == "float32"
    assert document["num_parameters"] == inspect(fp32_bundle).document()["num_parameters"]
    assert "half-on-cpu" not in [finding["rule"] for finding in document["graphs"][0]["findings"]]


@pytest.mark.parametrize("factor", [1e6, 1e-8], ids=["overflow", "underflow"])
@pytest.mark.parametrize("name", [DOWN, TABLE])
def test_what_float16_does_not_hold_stays_float32(
    name: str, factor: float, fp32_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _edited(fp32_bundle, tmp_path / "fp32", name, lambda weight: weight * np.float32(factor))
    bundle = quantize(source, tmp_path / "fp16", QuantizeOptions("fp16"))
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "kept in float32" in line]
    assert note.endswith(f"values: {name}")
    kept = [one for one, array in _weights(bundle.path).items() if array.dtype == np.float32 and array.ndim == 2]
    assert f"{name}.weight" in kept
    assert not any(one.endswith("_proj.weight") for one in kept if one != f"{name}.weight")
    ids = np.random.default_rng(0).integers(3, 259, 48)
    expected = Engine(ModelBundle.open(source)).score(ids)
    np.testing.assert_allclose(Engine(bundle).score(ids), expected, atol=0.01 * np.abs(expected).max())

    # bfloat16 has the range of float32.
    quantize(source, tmp_path / "bf16", QuantizeOptions("bf16"))
    assert "kept in float32" not in capsys.readouterr().err


def test_the_format_is_checked_by_its_norm() -> None:
    half = FloatFormat("float16")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    assert half.unfit(weight) == ""
    assert half.unfit(weight * 0) == ""
    assert half.unfit(np.where(weight > 0, weight, weight * np.float32(1e-7))) == ""  # the small ones don't matter
    assert half.unfit(np.float32([65504, 65519])) == ""
    assert "6.55e+04" in half.unfit(np.float32([1, 65520]))
    assert half.unfit(weight * np.float32(1e-6)) == "values near zero"


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_weights_are_refused(scheme: str, bad: float, fp32_bundle: Path, tmp_path: Path) -> None:
    def damage(weight: np.ndarray) -> np.ndarray:
        weight[3, 5] = bad
        return weight

    source = _edited(fp32_bundle, tmp_path / "fp32", DOWN, damage)
    with pytest.raises(InputError, match=r"`model.layers.1.mlp.down_proj.weight` .* NaN or infinite"):
        quantize(source, tmp_path / "out", QuantizeOptions(scheme, measure=False))
    assert not (tmp_path / "out").exists()


def _layer_graph(folder: Path, kind: str, weight: np.ndarray, bias: np.ndarray) -> OnnxModel:
    """Write a graph of one linear layer, its weight `[N, K]` stored in one way or another."""
    stored, nodes = weight, []
    if kind == "matmul":
        stored, nodes = weight.T, [helper.make_node("MatMul", ["x", "w"], ["y"])]
    elif kind == "transposed":
        nodes = [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ]
    elif kind == "gemm":
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(weight)])],
        [numpy_helper.from_array(np.ascontiguousarray(stored), "w"), numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "in.onnx")
    return OnnxModel.load(folder / "in.onnx")


@pytest.mark.parametrize("kind", ["matmul", "transposed", "gemm"])
@pytest.mark.parametrize("write", [write_float_linear, write_half_linear])
def test_products_are_those_of_pytorch(kind: str, write: Any, tmp_path: Path) -> None:
    """By ONNX's reference in NumPy, which does multiply in float16; ONNX Runtime on a CPU widens everything."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.standard_normal((5, 96)).astype(np.float32), rng.standard_normal((24, 96)).astype(np.float32)
    bias = rng.standard_normal(24).astype(np.float32)
    model = _layer_graph(tmp_path, kind, weight, bias)
    (linear,) = find_linears(model)
    weights = WeightFile(tmp_path, "out")
    graph = GraphBuilder(weights)
    write(graph, linear, FloatFormat("float16").round(linear.read(model)))
    graph.weight("b", bias)
    (path,) = weights.save(graph.rewrite(model))
    actual = ReferenceEvaluator(onnx.load(path)).run(None, {"x": hidden})[0]
    assert actual.dtype == np.float32
    half = torch.from_numpy(weight).half()
    if write is write_float_linear:
        expected = torch.from_numpy(hidden) @ half.float().T
    else:
        expected = (torch.from_numpy(hidden).half() @ half.T).float()
    expected = expected.numpy() + (bias if kind == "gemm" else 0)
    # NumPy and PyTorch add up in another order, and float16 has eleven bits.
    np.testing.assert_allclose(actual, expected, atol=1e-4 if write is write_float_linear else 0.06)


def test_products_in_float16_but_where_values_leave_its_range(
    fp32_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _edited(fp32_bundle, tmp_path / "fp32", DOWN, lambda weight: weight * np.float32(3e4))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20, encoding="utf-8")
    options = QuantizeOptions("fp16", settings={"compute": "float16"}, calibration=Calibration(text, 2, 64))
    bundle = quantize(source, tmp_path / "out", options)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "computed in float32" in line]
    assert note.count("model.layers") == 1
    assert f"{DOWN} (outputs: values up to " in note
    assert f"{DOWN}.weight.float16" in _weights(bundle.path)  # the weight itself fits
    activations = {row["role"]: row["activations"] for row in inspect(bundle.path).document()["graphs"][0]["layers"]}
    assert activations["qkv_proj"] == activations["gate_proj"] == "float16"
    assert inspect(bundle.path).document()["graphs"][0]["findings"] == []
    graph = OnnxModel.load(bundle.model).proto.graph
    casts = [node for node in graph.node if node.op_type == "Cast" and node.output[0].endswith("product.float16")]
    assert [node.input[0] for node in casts] == ["model.layers.0.mlp.product"]
    assert {value.type.tensor_type.elem_type for value in graph.output} == {TensorProto.FLOAT}
    step = bundle.manifest.lineage[-1]
    assert step.options["fp16"] == {"compute": "float16"}
    assert step.calibration is not None
    ids = np.random.default_rng(0).integers(97, 123, 48)
    expected, actual = Engine(ModelBundle.open(source)).score(ids), Engine(bundle).score(ids)
    np.testing.assert_allclose(actual, expected, atol=0.01 * np.abs(expected).max())


def test_half_precision_is_not_quantized_again(fp32_bundle: Path, tmp_path: Path) -> None:
    quantize(fp32_bundle, tmp_path / "fp16", QuantizeOptions("fp16"))
    with pytest.raises(UnsupportedError, match="nothing to quantize") as refused:
        quantize(tmp_path / "fp16", tmp_path / "out", QuantizeOptions("int8"))
    assert "start from the float model" in refused.value.hint


def test_an_unknown_format_of_products_is_refused(fp32_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="compute `bfloat16`: unknown"):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("fp16", settings={"compute": "bfloat16"}))
