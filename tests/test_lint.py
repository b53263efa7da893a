"""The rules of the lint: each on a graph that has its form and on the same graph without it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmfast.graph.lint import RULES, lint
from llmfast.graph.model import OnnxModel

FLOAT = TensorProto.FLOAT


def graph(
    nodes: list[onnx.NodeProto],
    arrays: dict[str, np.ndarray] | None = None,
    inputs: dict[str, int] | None = None,
    output: str = "y",
    opset: int = 21,
) -> OnnxModel:
    """Return a graph from nodes and named arrays; inputs are `[rows, 64]` floats unless their type is given."""
    given = {"x": FLOAT} if inputs is None else inputs
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info(name, kind, None) for name, kind in given.items()],
            [helper.make_tensor_value_info(output, FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in (arrays or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    return OnnxModel(model, Path("tiny.onnx"))


def node(op_type: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    contrib = {"MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    domain = "com.microsoft" if op_type in contrib else ""
    return helper.make_node(op_type, names, output.split(), name=f"the_{op_type}_{output}", domain=domain, **attributes)


def nbits(bits: int = 4, block_size: int = 32, accuracy_level: int = 4, extra: str = "", **arrays: np.ndarray):
    stored = {"w": np.zeros((8, 2, 16), np.uint8), "s": np.ones((8, 2), np.float32)} | arrays
    attributes = {"K": 64, "N": 8, "bits": bits, "block_size": block_size, "accuracy_level": accuracy_level}
    return graph([node("MatMulNBits", f"x w s {extra}".strip(), "y", **attributes)], stored)


def integers(activations: type, weights: type) -> OnnxModel:
    arrays = {"one": np.float32(1), "zero": np.zeros((), activations), "w": np.ones((64, 8), weights)}
    nodes = [node("QuantizeLinear", "x one zero", "q"), node("MatMulInteger", "q w", "i"), node("Cast", "i", "y", to=1)]
    return graph(nodes, {key: np.asarray(value) for key, value in arrays.items()})


def rounded(by_operator: bool) -> OnnxModel:
    arrays = {"one": np.float32(1), "zero": np.uint8(128), "none": np.int8(0), "w": np.ones((64, 8), np.int8)}
    if by_operator:
        product = [node("QLinearMatMul", "q one zero w one none one zero", "p")]
    else:
        product = [
            node("DequantizeLinear", "q one zero", "d"),
            node("DequantizeLinear", "w one none", "m"),
            node("MatMul", "d m", "f"),
            node("QuantizeLinear", "f one zero", "p"),
        ]
    nodes = [node("QuantizeLinear", "x one zero", "q"), *product, node("DequantizeLinear", "p one zero", "y")]
    return graph(nodes, {key: np.asarray(value) for key, value in arrays.items()})


def dynamic(per_token: bool) -> OnnxModel:
    one, zero = np.asarray(np.float32(1)), np.asarray(np.uint8(0))
    quantize = node("QuantizeLinear", "x one zero", "q") if per_token else node("DynamicQuantizeLinear", "x", "q s z")
    nodes = [quantize, node("MatMulInteger", "q w", "i"), node("Cast", "i", "y", to=1)]
    return graph(nodes, {"one": one, "zero": zero, "w": np.ones((64, 8), np.int8)})


def dequantized(with_activations: bool, weights: np.ndarray) -> OnnxModel:
    scale = np.asarray(np.float32(1))
    nodes = [node("DequantizeLinear", "w s", "wf")]
    if with_activations:
        zero = np.asarray(np.uint8(0))
        nodes += [node("QuantizeLinear", "x s zero", "q"), node("DequantizeLinear", "q s zero", "xf")]
        return graph([*nodes, node("MatMul", "xf wf", "y")], {"w": weights, "s": scale, "zero": zero})
    return graph([*nodes, node("MatMul", "x wf", "y")], {"w": weights, "s": scale})


def multiplied(dtype: type) -> OnnxModel:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return graph([node("MatMul", "x w", "y")], {"w": np.ones((64, 8), dtype)}, {"x": kind})


def cached(grows: bool) -> OnnxModel:
    inputs = {"x": FLOAT, "past_key_values.0.key": FLOAT}
    other = "past_key_values.0.key" if grows else "x"
    return graph([node("Concat", f"{other} x", "y", axis=0)], inputs=inputs)


def attention(checks: bool) -> OnnxModel:
    nodes = [node("Softmax", "x", "p"), node("IsNaN", "p" if checks else "x", "n"), node("Where", "n zero p", "y")]
    return graph(nodes, {"zero": np.asarray(np.float32(0))})


def norm(by_reciprocal: bool) -> OnnxModel:
    nodes = [
        node("Pow", "x two", "square"),
        node("ReduceMean", "square axes", "mean"),
        node("Add", "mean epsilon", "shifted"),
        node("Sqrt", "shifted", "root"),
    ]
    nodes += (
        [node("Reciprocal", "root", "inverse"), node("Mul", "x inverse", "normed")]
        if by_reciprocal
        else [node("Div", "x root", "normed")]
    )
    arrays = {"two": np.float32(2), "epsilon": np.float32(1e-5), "axes": np.array([-1]), "w": np.ones(64, np.float32)}
    return graph([*nodes, node("Mul", "normed w", "y")], {key: np.asarray(value) for key, value in arrays.items()})


def gelu(by_tanh: bool) -> OnnxModel:
    if not by_tanh:
        return graph([node("Gelu", "x", "y", approximate="tanh")])
    constants = {"three": 3, "c": 0.044715, "k": 0.7978845, "one": 1, "half": 0.5}
    nodes = [
        node("Pow", "x three", "cube"),
        node("Mul", "cube c", "small"),
        node("Add", "x small", "sum"),
        node("Mul", "sum k", "scaled"),
        node("Tanh", "scaled", "tanh"),
        node("Add", "tanh one", "shifted"),
        node("Mul", "x half", "halved"),
        node("Mul", "halved shifted", "y"),
    ]
    return graph(nodes, {key: np.asarray(np.float32(value)) for key, value in constants.items()})


def head(everywhere: bool) -> OnnxModel:
    start = [] if everywhere else [node("Gather", "x last", "picked", axis=0)]
    hidden = "x" if everywhere else "picked"
    nodes = [*start, node("Relu", hidden, "normed"), node("MatMul", "normed w", "logits")]
    if everywhere:
        nodes = [node("Relu", "x", "l0"), *(node("Relu", f"l{i}", f"l{i + 1}") for i in range(9)), *nodes]
        nodes[-2] = node("Relu", "l9", "normed")
    arrays = {"w": np.ones((64, 8), np.float32), "last": np.array([0])}
    return graph(nodes, arrays, {"x": FLOAT, "past_key_values.0.key": FLOAT}, "logits")


def norm_before_head(first: str) -> OnnxModel:
    """Return a head behind norms that multiply a weight, or what a Constant makes, by the activations."""
    scale = node("Constant", "", "scale", value=numpy_helper.from_array(np.ones(64, np.float32)))
    nodes = [scale, *(node("Mul", f"{first} l{i}", f"l{i + 1}") for i in range(9))]
    nodes = [node("Relu", "x", "l0"), *nodes, node("MatMul", "l9 w", "logits")]
    arrays = {"w": np.ones((64, 8), np.float32), "weight": np.ones(64, np.float32)}
    return graph(nodes, arrays, {"x": FLOAT, "past_key_values.0.key": FLOAT}, "logits")


def table(of_floats: bool) -> OnnxModel:
    arrays = {
        "t": np.ones((100 if of_floats else 1, 64), np.float32),
        "w": np.zeros((8, 2, 16), np.uint8),
        "s": np.ones((8, 2), np.float32),
    }
    attributes = {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 4}
    nodes = [node("Gather", "t ids", "h"), node("MatMulNBits", "h w s", "y", **attributes)]
    if not of_floats:
        arrays["w"] = np.zeros((800, 2, 16), np.uint8)
        arrays["s"] = np.ones((800, 2), np.float32)
        nodes[1] = node("MatMulNBits", "h w s", "y", **attributes | {"N": 800})
    return graph(nodes, arrays, {"ids": TensorProto.INT64})


INT4 = np.ones((64, 8), np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4)))
ONES = np.ones((64, 8), np.int8)
ORDER = {"g": np.zeros(64, np.int32)}
CASES: dict[str, tuple[Callable[[], OnnxModel], Callable[[], OnnxModel]]] = {
    "nbits-accuracy-level": (lambda: nbits(accuracy_level=0), nbits),
    "nbits-block-size": (lambda: nbits(bits=2, block_size=16), lambda: nbits(bits=2)),
    "nbits-group-index": (lambda: nbits(extra="- g", **ORDER), nbits),
    "nbits-float-zero-point": (
        lambda: nbits(extra="z", z=np.ones((8, 2), np.float32)),
        lambda: nbits(extra="z", z=np.ones((8, 1), np.uint8)),
    ),
    "integer-signs": (lambda: integers(np.int8, np.int8), lambda: integers(np.uint8, np.int8)),
    "saturating-product": (lambda: rounded(True), lambda: rounded(False)),
    "activations-per-tensor": (lambda: dynamic(False), lambda: dynamic(True)),
    "dequantized-weight": (lambda: dequantized(False, ONES), lambda: dequantized(True, ONES)),
    "blocks-as-dequantize": (lambda: dequantized(False, INT4), lambda: dequantized(True, ONES)),
    "half-on-cpu": (lambda: multiplied(np.float16), lambda: multiplied(np.float32)),
    "growing-cache": (lambda: cached(True), lambda: cached(False)),
    "nan-check": (lambda: attention(True), lambda: attention(False)),
    "norm-by-reciprocal": (lambda: norm(True), lambda: norm(False)),
    "gelu-by-tanh": (lambda: gelu(True), lambda: gelu(False)),
    "logits-everywhere": (lambda: head(True), lambda: head(False)),
    "float-table": (lambda: table(True), lambda: table(False)),
}


def found(model: OnnxModel) -> list[str]:
    return [finding.rule.name for finding in lint(model)]


def test_every_rule_has_a_case() -> None:
    assert [rule.name for rule in RULES] == list(CASES)
    assert all(rule.affects in ("speed", "quality", "size") and rule.reason and rule.remedy for rule in RULES)


@pytest.mark.parametrize("rule", CASES)
def test_rule_finds_its_form_and_nothing_else(rule: str) -> None:
    with_form, without = (make() for make in CASES[rule])
    assert found(with_form) == [rule]
    assert found(without) == []
    (finding,) = lint(with_form)
    assert all(name.startswith("the_") for name in finding.nodes)


@pytest.mark.parametrize("first", ["weight", "scale"])
def test_a_head_is_followed_past_what_its_norm_multiplies_first(first: str) -> None:
    assert found(norm_before_head(first)) == ["logits-everywhere"]


def test_unsigned_weights_are_found_behind_their_zero_point() -> None:
    assert found(integers(np.uint8, np.uint8)) == ["integer-signs"]


@pytest.mark.parametrize(
    ("rule", "fused"), [("norm-by-reciprocal", "SimplifiedLayerNormalization"), ("gelu-by-tanh", "Gelu")]
)
def test_what_onnxruntime_is_said_to_leave_alone_it_leaves_alone(rule: str, fused: str, tmp_path: Path) -> None:
    for make, is_fused in zip(CASES[rule], (False, True), strict=True):
        model = make()
        model.proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", FLOAT, ["rows", 64]))
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kept = [one.op_type for one in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert (kept == [fused]) == is_fused


def test_models_of_llmfast_have_no_slow_form(fp32_bundle: Path, tmp_path: Path) -> None:
    from llmfast.quantize.stage import QuantizeOptions, quantize

    assert found(OnnxModel.load(fp32_bundle / "model.onnx")) == []
    for scheme in ("int4", "int8"):
        bundle = quantize(fp32_bundle, tmp_path / scheme, QuantizeOptions(scheme))
        assert found(OnnxModel.load(bundle.model)) == []


def test_nodes_inside_subgraphs_are_looked_at() -> None:
    inner = nbits(accuracy_level=0).proto.graph
    branch = helper.make_graph(list(inner.node), "branch", [], list(inner.output))
    outer = helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch, else_branch=branch)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in inner.initializer}
    assert found(graph([outer], arrays, {"x": FLOAT, "c": TensorProto.BOOL})) == ["nbits-accuracy-level"]
