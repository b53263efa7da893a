"""Weight files: what several graphs of a bundle share is stored once."""

from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from llmfast.bundle import Manifest, ModelBundle, write_manifest
from llmfast.graph.builder import GraphBuilder
from llmfast.graph.model import OnnxModel, count_parameters, count_weight_bytes
from llmfast.graph.weights import WeightFile
from llmfast.quantize.stage import QuantizeOptions, plan_layers, quantize

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(64, 32)).astype(np.float32)
MATRICES = {role: RNG.normal(size=(32, 32)).astype(np.float32) for role in ("encoder", "decoder")}
IDS = RNG.integers(0, 64, (2, 5))


def write_two_graphs(folder: Path) -> ModelBundle:
    """Write a bundle of two graphs: each looks rows of one table up, and multiplies by its own matrix."""
    folder.mkdir()
    weights = WeightFile(folder)
    models = {}
    for role, matrix in MATRICES.items():
        graph = GraphBuilder(weights)
        rows = graph.op("Gather", [graph.weight("shared.weight", TABLE), "input_ids"], "rows")
        hidden = graph.op("MatMul", [rows, graph.weight(f"{role}.fc.weight", matrix)], "hidden")
        graph.op("FusedMatMul", [hidden, "shared.weight"], "logits", "com.microsoft", transB=1)
        models[role] = graph.build(
            role,
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", 64])],
        )
    weights.save_all(models)
    graphs = {role: {"file": f"{role}.onnx", "inputs": ["input_ids"], "outputs": ["logits"]} for role in models}
    write_manifest(folder, Manifest("unknown", graphs=graphs))
    return ModelBundle.open(folder)


def run(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input_ids": IDS})[0]


def test_graphs_share_a_table(tmp_path: Path) -> None:
    bundle = write_two_graphs(tmp_path / "two")
    assert list(bundle.graphs) == ["encoder", "decoder"]
    models = [OnnxModel.load(path) for path in bundle.graphs.values()]
    assert count_parameters(models) == TABLE.size + 2 * 32 * 32
    assert count_weight_bytes(models) == 4 * (TABLE.size + 2 * 32 * 32)
    (data,) = bundle.path.glob("*.data")
    assert data.stat().st_size < 4 * (2 * TABLE.size + 2 * 32 * 32)
    for role, path in bundle.graphs.items():
        np.testing.assert_allclose(run(path), TABLE[IDS] @ MATRICES[role] @ TABLE.T, rtol=1e-4, atol=1e-4)


def test_graphs_may_have_a_large_and_a_small_weight_of_one_name(tmp_path: Path) -> None:
    weights = WeightFile(tmp_path)
    biases = {"model": RNG.normal(size=512).astype(np.float32), "prefill": RNG.normal(size=4).astype(np.float32)}
    models = {}
    for role, bias in biases.items():
        graph = GraphBuilder(weights)
        graph.op("Add", ["input_ids", graph.weight("bias", bias)], "y")
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(bias)]) for name in ("input_ids", "y")]
        models[role] = graph.build(role, values[:1], values[1:])
    weights.save_all(models)
    for role, bias in biases.items():
        session = onnxruntime.InferenceSession(tmp_path / f"{role}.onnx", providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"input_ids": np.zeros_like(bias)})[0], bias)


def test_every_graph_of_a_bundle_is_quantized(tmp_path: Path) -> None:
    source = write_two_graphs(tmp_path / "two")
    options = QuantizeOptions("int4")
    planned = plan_layers(source.path, tmp_path / "int4", options)
    bundle = quantize(source.path, tmp_path / "int4", options)
    assert set(bundle.manifest.graphs) == {"encoder", "decoder"}
    assert bundle.manifest.graphs["decoder"]["outputs"] == ["logits"]
    assert [(row["role"], row["num_parameters"]) for row in planned] == [("embedding", TABLE.size), ("fc", 2 * 32 * 32)]
    assert 5 < bundle.manifest.bits_per_weight < 12
    for role, path in bundle.graphs.items():
        operators = {node.op_type for node in OnnxModel.load(path).proto.graph.node}
        assert {"GatherBlockQuantized", "MatMulNBits"} <= operators
        expected = run(source.graphs[role])
        assert np.abs(run(path) - expected).max() < 0.2 * np.abs(expected).max()
