"""W8A8 of a lone `model.onnx`: each way to scale its activations, and the bias inside the integer product."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmfast.errors import OptionError
from llmfast.export.stage import export
from llmfast.graph.linear import find_linears, lone_adds, with_bias
from llmfast.graph.model import OnnxModel
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.runtime import open_session
from tests.tiny_encoder import WORDS, save_encoder

TOKENS, WIDTH, HIDDEN = 7, 32, 48


def _layers() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"up.weight": (WIDTH, HIDDEN), "up.bias": (HIDDEN,), "down.weight": (HIDDEN, WIDTH), "down.bias": (WIDTH,)}
    return {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}


def _model(folder: Path) -> Path:
    """Write MatMul, Add, Relu, MatMul, Add, as traced encoders have them; both sums are written bias first."""
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["up.product"]),
        helper.make_node("Add", ["up.bias", "up.product"], ["up.sum"]),
        helper.make_node("Relu", ["up.sum"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "down.weight"], ["down.product"]),
        helper.make_node("Add", ["down.bias", "down.product"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", WIDTH])],
        [numpy_helper.from_array(values, name) for name, values in _layers().items()],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def _quantized(folder: Path, **settings: str) -> tuple[onnx.ModelProto, onnxruntime.InferenceSession]:
    quantize(_model(folder), folder / "int8", QuantizeOptions("int8", settings=settings))
    path = folder / "int8" / "model.onnx"
    return onnx.load(path), open_session(path)


def _round_whole(hidden: np.ndarray) -> np.ndarray:
    """Round to uint8 with one scale, as the ONNX specification has DynamicQuantizeLinear do it."""
    low, high = min(hidden.min(), 0), max(hidden.max(), 0)
    scale = (high - low) / 255
    zero_point = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(hidden / scale) + zero_point, 0, 255) - zero_point) * scale


def test_one_scale_for_the_whole_input_is_the_arithmetic_it_claims(tmp_path: Path) -> None:
    model, session = _quantized(tmp_path, granularity="tensor")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {
        name: stored[f"{name}.weight_q8"] * np.float64(stored[f"{name}.weight_scale"]) for name in ("up", "down")
    }
    biases = _layers()
    x = np.random.default_rng(1).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    hidden = np.maximum(_round_whole(x) @ weights["up"] + biases["up.bias"], 0)
    expected = _round_whole(hidden) @ weights["down"] + biases["down.bias"]
    # A value that lies between two codes may go either way: that is one step of one of 48 features.
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=hidden.max() / 255)


@pytest.mark.parametrize("settings", [{}, {"granularity": "tensor"}], ids=["token", "tensor"])
def test_every_granularity_stays_close_to_the_float_model(settings: dict[str, str], tmp_path: Path) -> None:
    _, session = _quantized(tmp_path, **settings)
    x = np.random.default_rng(1).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    layers = _layers()
    expected = np.maximum(x @ layers["up.weight"] + layers["up.bias"], 0) @ layers["down.weight"] + layers["down.bias"]
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=np.abs(expected).max() / 40)


def test_the_integer_product_takes_in_the_bias(tmp_path: Path) -> None:
    model, _ = _quantized(tmp_path, granularity="tensor")
    operators = [node.op_type for node in model.graph.node]
    assert "Add" not in operators
    assert operators.count("MatMulIntegerToFloat") == 2


def test_static_forms_hold_the_same_numbers(tmp_path: Path) -> None:
    save_encoder(tmp_path / "checkpoint", vocab_size=len(WORDS))
    export(str(tmp_path / "checkpoint"), tmp_path / "fp32")
    calibration = Calibration(num_samples=4, seq_len=16)
    feeds = {"input_ids": np.arange(24).reshape(2, 12) % len(WORDS), "attention_mask": np.ones((2, 12), np.int64)}
    feeds["token_type_ids"] = np.zeros((2, 12), np.int64)
    answers, operators = {}, {}
    for form in ("qdq", "operator"):
        settings = {"activations": "static", "form": form}
        quantize(
            tmp_path / "fp32", tmp_path / form, QuantizeOptions("int8", settings=settings, calibration=calibration)
        )
        path = tmp_path / form / "model.onnx"
        operators[form] = Counter(node.op_type for node in onnx.load(path).graph.node)
        session = open_session(path)
        wanted = {one.name for one in session.get_inputs()}
        answers[form] = session.run(None, {name: value for name, value in feeds.items() if name in wanted})[0]
    products = {form: found["MatMulIntegerToFloat"] + found["MatMul"] for form, found in operators.items()}
    assert products["operator"] == products["qdq"]
    assert operators["operator"]["MatMulIntegerToFloat"] >= 12
    assert operators["operator"]["DequantizeLinear"] == 0
    np.testing.assert_allclose(answers["operator"], answers["qdq"], atol=1e-5)


@pytest.mark.parametrize("reader", ["output", "node", "matrix"])
def test_a_sum_that_is_no_bias_stays(reader: str, tmp_path: Path) -> None:
    path = _model(tmp_path)
    proto = onnx.load(path)
    if reader == "output":  # somebody wants the product itself
        proto.graph.output.append(helper.make_tensor_value_info("up.product", TensorProto.FLOAT, None))
    elif reader == "node":
        proto.graph.node.insert(2, helper.make_node("Neg", ["up.product"], ["negative"]))
    else:  # a term for each token, not for each feature
        bias = next(one for one in proto.graph.initializer if one.name == "up.bias")
        bias.CopyFrom(numpy_helper.from_array(np.zeros((TOKENS, HIDDEN), np.float32), "up.bias"))
    onnx.save(proto, path)
    model = OnnxModel.load(path)
    adds = lone_adds(model)
    found = [with_bias(model, linear, adds) for linear in find_linears(model)]
    assert [(linear.bias, linear.output) for linear in found] == [("", "up.product"), ("down.bias", "y")]


@pytest.mark.parametrize(("name", "value"), [("granularity", "row"), ("form", "qoperator")])
def test_unknown_choices_are_named(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"{name} `{value}`"):
        _quantized(tmp_path, **{name: value})
