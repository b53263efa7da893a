"""Nodes are named by their part of the model, whatever exporters and ONNX Runtime call them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmfast.export.stage import export
from llmfast.graph.model import OnnxModel
from llmfast.graph.parts import find_part, kind_of, name_parts
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from tests.tiny_encoder import WORDS, save_encoder

LAYERS = 2  # of the tiny BERT


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_encoder(folder / "checkpoint", vocab_size=len(WORDS))
    export(str(folder / "checkpoint"), folder / "encoder")
    quantize(folder / "encoder", folder / "int8", QuantizeOptions(scheme="int8"))
    return folder


def _profiled(path: Path, parts: dict[str, str]) -> Counter[str]:
    """Run a graph and count the parts of the nodes that ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.parent / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {entry.name: np.ones((2, 6), np.int64) for entry in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return Counter(
        find_part(parts, event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]) for event in ran
    )


@pytest.mark.parametrize("name", ["encoder", "int8"])
def test_a_traced_encoder_has_the_roles_of_its_modules(name: str, encoder: Path) -> None:
    model = OnnxModel.load(encoder / name / "model.onnx", any_opset=True)
    matrices = ("MatMul", "Gemm", "MatMulIntegerToFloat", "MatMulNBits")
    parts = name_parts(model)
    found = Counter(parts[node.name] for node in model.proto.graph.node if node.op_type in matrices)
    assert {role: found[role] for role in ("query", "key", "value")} == dict.fromkeys(("query", "key", "value"), LAYERS)
    assert found["dense"] >= 3 * LAYERS
    ran = _profiled(encoder / name / "model.onnx", parts)
    known = {"query", "key", "value", "dense", "attention", "norm", "activation", "embedding", "layout", "elementwise"}
    assert set(ran) - {"quantizing", "other"} == known
    assert ran["norm"] == 2 * LAYERS + 1
    assert ran["activation"] == LAYERS
    assert ("quantizing" in ran) == (name == "int8")


def test_scales_of_activations_are_quantizing_and_those_of_results_the_layers() -> None:
    def constant(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(np.ones(shape, np.float32), name)

    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Mul", ["x", "x"], ["gated"], "n1"),
            node("Abs", ["gated"], ["abs"], "n2"),
            node("ReduceMax", ["abs", "axes"], ["largest"], "n3"),
            node("Mul", ["largest", "step"], ["scale"], "n4"),
            node("QuantizeLinear", ["gated", "scale", "zero"], ["codes"], "n5"),
            node("DequantizeLinear", ["codes", "scale", "zero"], ["back"], "n6"),
            node("MatMul", ["back", "model.layers.0.mlp.down_proj.weight"], ["product"], "node_MatMul_9"),
            node("Mul", ["product", "scale"], ["scaled"], "n7"),
            node("Add", ["scaled", "bias"], ["y"], "n8"),
            node("Add", ["y", "x"], ["z"], "n9"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 4])],
        [
            constant("step", 1), constant("bias", 4), constant("model.layers.0.mlp.down_proj.weight", 4, 4),
            numpy_helper.from_array(np.array([1]), "axes"), numpy_helper.from_array(np.array(0, np.int8), "zero"),
        ],
    )  # fmt: skip
    parts = name_parts(OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), Path()))
    assert [parts[f"n{number}"] for number in range(1, 7)] == ["elementwise", *["quantizing"] * 5]
    assert [parts[name] for name in ("node_MatMul_9", "n7", "n8", "n9")] == [*["down_proj"] * 3, "elementwise"]


@pytest.mark.parametrize(
    ("name", "operator", "part"),
    [
        ("node_linear", "MatMul", "query"),
        ("node_linear/MatMulAddFusion", "Gemm", "query"),
        ("node_linear/MatMulScaleFusion/", "FusedMatMul", "query"),
        ("node_linear_token_3", "MatMul", "query"),
        ("node_linear_1", "MatMul", "key"),
        ("BiasGelu_token_0", "BiasGelu", "activation"),
        ("SkipLayerNormalization_token_5", "SkipLayerNormalization", "norm"),
        ("", "GroupQueryAttention", "attention"),
        ("gone", "Frobnicate", "other"),
    ],
)
def test_names_of_fused_nodes_lead_back(name: str, operator: str, part: str) -> None:
    assert find_part({"node_linear": "query", "node_linear_1": "key"}, name, operator) == part


def test_kinds_are_of_whole_names() -> None:
    assert kind_of("DequantizeLinear") == kind_of("QuantizeLinear") == "quantizing"
    assert kind_of("Softmax") == "attention"
    assert kind_of("LogSoftmax") == "other"
