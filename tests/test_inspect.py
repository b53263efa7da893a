"""`llmfast inspect`: layers, formats, cache, lineage, findings; of bundles and of graphs of other makers."""

import csv
import io
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from llmfast.bundle import Manifest, ModelBundle, write_manifest
from llmfast.cli import app
from llmfast.graph.census import layer_name
from llmfast.inspect.stage import inspect
from llmfast.quantize.stage import QuantizeOptions, quantize


def run(*arguments: object):
    return CliRunner().invoke(app, ["inspect", *[str(argument) for argument in arguments]])


@pytest.fixture(scope="module")
def int4(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("inspect") / "int4"
    quantize(fp32_bundle, output, QuantizeOptions("int4", settings={"block_size": "16", "symmetric": "true"}))
    return output


def rows_of(document: dict) -> dict[str, dict]:
    (graph,) = document["graphs"]
    return {row["role"]: row for row in graph["layers"]}


def test_float_bundle_is_counted_exactly(fp32_bundle: Path) -> None:
    document = inspect(fp32_bundle).document()
    manifest = ModelBundle.open(fp32_bundle).manifest
    proto = onnx.load(fp32_bundle / "model.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    floats = {name: array for name, array in stored.items() if array.dtype == np.float32}
    rows = rows_of(document)
    assert document["num_parameters"] == manifest.architecture["num_parameters"]
    assert sum(row["num_parameters"] for row in rows.values()) == document["num_parameters"]
    assert sum(row["bytes"] for row in rows.values()) == sum(array.nbytes for array in floats.values())
    assert document["bits_per_weight"] == pytest.approx(32, abs=0.1)
    assert {role: row["layers"] for role, row in rows.items()} == {
        "embedding": 1,
        "norm": 5,
        "position table": 2,
        **dict.fromkeys(("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2),
    }
    assert rows["down_proj"]["num_parameters"] == 2 * 64 * 96
    (graph,) = document["graphs"]
    assert sum(graph["operators"].values()) == len(proto.graph.node)
    assert graph["operators"]["com.microsoft.GroupQueryAttention"] == 2
    assert graph["cache"] == {
        "tensors": 4,
        "bytes_per_token": 2 * 2 * 2 * 16 * 4,  # layers, key and value, heads, head size, float32
        "context_length": 512,
        "bytes_at_context": 512 * 512,
    }
    assert graph["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "seq"]}
    assert sum(entry["bytes"] for entry in document["files"]) == document["size_bytes"]


def test_number_formats_of_a_quantized_bundle(int4: Path) -> None:
    document = inspect(int4).document()
    rows = rows_of(document)
    formats = ("weights", "bits", "block_size", "symmetric", "activations")
    assert [rows["down_proj"][key] for key in formats] == ["4 bit", 4, 16, True, "8 bit, in the kernel"]
    assert [rows["embedding"][key] for key in formats[:4]] == ["8 bit", 8, 64, True]
    assert rows["down_proj"]["bytes"] == 2 * 64 * 96 // 2 + 2 * 64 * 96 // 16 * 2  # codes, and a float16 scale a block
    assert document["num_parameters"] == inspect_parameters(int4)
    assert document["bits_per_weight"] == pytest.approx(ModelBundle.open(int4).manifest.bits_per_weight)
    assert [(step["stage"], step["method"]) for step in document["lineage"]] == [
        ("export", "direct"),
        ("quantize", "int4:rtn"),
    ]
    assert document["lineage"][1]["options"]["int4"]["block_size"] == 16


def inspect_parameters(path: Path) -> int:
    """Count from the graph alone, as for a model without a manifest."""
    document = inspect(ModelBundle.open(path).model).document()
    assert document["lineage"] == []
    return document["num_parameters"]


def test_bundle_of_several_graphs(fp32_bundle: Path, tmp_path: Path) -> None:
    for role in ("encoder", "decoder"):
        shutil.copyfile(fp32_bundle / "model.onnx", tmp_path / f"{role}.onnx")
    graphs = {role: {"file": f"{role}.onnx", "inputs": [], "outputs": []} for role in ("encoder", "decoder")}
    write_manifest(tmp_path, Manifest("unknown", graphs=graphs))
    document = inspect(tmp_path).document()
    assert [(graph["role"], graph["file"]) for graph in document["graphs"]] == [
        ("encoder", "encoder.onnx"),
        ("decoder", "decoder.onnx"),
    ]
    assert "decoder: decoder.onnx, opset 21, llmfast" in run(tmp_path).stdout


def test_int8_is_said_to_be_per_token(fp32_bundle: Path, tmp_path: Path) -> None:
    quantize(fp32_bundle, tmp_path / "int8", QuantizeOptions("int8"))
    row = rows_of(inspect(tmp_path / "int8").document())["qkv_proj"]
    assert (row["weights"], row["block_size"], row["symmetric"]) == ("8 bit", 0, True)
    assert row["activations"] == "8 bit, per token"


def save(tmp_path: Path, nodes: list, arrays: dict[str, np.ndarray], opset: int) -> Path:
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "other",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
            [numpy_helper.from_array(array, name) for name, array in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        producer_name="another",
        producer_version="1.0",
    )
    onnx.save(model, tmp_path / "other.onnx")
    return tmp_path / "other.onnx"


@pytest.mark.parametrize("opset", [9, 13, 23])
def test_graphs_of_other_makers(tmp_path: Path, opset: int) -> None:
    arrays = {
        "onnx::MatMul_12": np.ones((64, 32), np.float32),
        "codes": np.ones((32, 8), np.uint8),
        "scale": np.float32(0.1) * np.ones(1, np.float32),
        "zero": np.array([3], np.uint8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_12"], ["h"], name="/encoder/layer.0/output/dense/MatMul"),
        helper.make_node(
            "DynamicQuantizeMatMul",
            ["h", "codes", "scale", "zero"],
            ["y"],
            name="/encoder/layer.0/intermediate/MatMul_quant",
            domain="com.microsoft",
        ),
    ]
    document = inspect(save(tmp_path, nodes, arrays, opset)).document()
    rows = rows_of(document)
    assert set(rows) == {"dense", "codes"}
    assert (rows["dense"]["weights"], rows["dense"]["bytes"]) == ("float32", 64 * 32 * 4)
    assert rows["codes"]["activations"] == "8 bit, per tensor"
    assert rows["codes"]["symmetric"] is False
    assert document["num_parameters"] == 64 * 32 + 32 * 8
    (graph,) = document["graphs"]
    assert [finding["rule"] for finding in graph["findings"]] == ["integer-signs", "activations-per-tensor"]
    assert (graph["opset"], graph["producer"], graph["cache"]) == (opset, "another 1.0", None)


def test_table_of_codes_that_is_also_the_head(tmp_path: Path) -> None:
    """This is what `quantize_dynamic` of ONNX Runtime makes of a tied embedding."""
    arrays = {
        "t_quantized": np.ones((8, 64), np.uint8),
        "s": np.ones((), np.float32),
        "z": np.zeros((), np.uint8),
        "ids": np.array([[1, 2]]),
    }
    nodes = [
        helper.make_node("Gather", ["t_quantized", "ids"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["looked_up"]),
        helper.make_node("Transpose", ["t_quantized"], ["turned"]),
        helper.make_node("DequantizeLinear", ["turned", "s", "z"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="head"),
    ]
    document = inspect(save(tmp_path, nodes, arrays, 21)).document()
    (row,) = document["graphs"][0]["layers"]
    assert [row[key] for key in ("role", "layers", "num_parameters", "bytes")] == ["embedding", 1, 512, 512 + 4 + 1]
    assert [row[key] for key in ("weights", "symmetric")] == ["8 bit", False]
    assert document["graphs"][0]["findings"][0]["rule"] == "dequantized-weight"


@pytest.mark.parametrize(
    ("weight", "node", "name"),
    [
        ("model.layers.0.mlp.up_proj.weight", "n", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj.weight_q4", "n", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.attn.q_proj.MatMul.weight_Q4G32", "n", "model.layers.0.attn.q_proj"),
        ("bert.encoder.layer.0.output.dense.weight_quantized", "n", "bert.encoder.layer.0.output.dense"),
        ("onnx::MatMul_1234", "/layer.0/attention/self/query/MatMul", "layer.0.attention.self.query"),
        ("val_12", "/lm_head/MatMul", "lm_head"),
        ("encoder.layers.0.mixer", "n", "encoder.layers.0.mixer"),
    ],
)
def test_names_of_layers(weight: str, node: str, name: str) -> None:
    assert layer_name(helper.make_node("MatMul", ["x", weight], ["y"], name=node), weight) == name


def test_formats(int4: Path) -> None:
    document = json.loads(run(int4, "--format", "json").stdout)
    assert document == inspect(int4).document()
    assert document["schema_version"] == 1
    rows = list(csv.DictReader(io.StringIO(run(int4, "--format", "csv").stdout)))
    assert [row["role"] for row in rows] == list(rows_of(document))
    table, markdown = run(int4).stdout, run(int4, "--format", "md").stdout
    for page in (table, markdown):
        assert "no slow form found" in page
        assert "KV cache: 512 bytes per token, 0.3 MB at 512 tokens" in page
        assert page.count("past_key_values.*.key") == 1
    assert "| down_proj | 2 | 12,288 | 4 bit | 16 | no |" in markdown


def test_weights_are_not_read(tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "large",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1 << 15])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1 << 15])],
            [TensorProto(name="w", dims=(1 << 15, 1 << 15), data_type=1, data_location=TensorProto.EXTERNAL)],
        )
    )
    model.graph.initializer[0].external_data.add(key="location", value="large.data")
    onnx.save(model, tmp_path / "large.onnx")
    with (tmp_path / "large.data").open("wb") as file:
        file.truncate(4 << 30)  # a hole on disk, but four GiB in memory if anyone read it

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))

    command = [sys.executable, "-m", "llmfast", "inspect", tmp_path / "large.onnx", "--format", "json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["num_parameters"], document["weight_bytes"]) == (1 << 30, 4 << 30)
    assert [entry["name"] for entry in document["files"]] == ["large.data", "large.onnx"]


def test_mistakes(tmp_path: Path, fp32_bundle: Path) -> None:
    assert run(tmp_path / "none").exit_code == 3
    assert run(fp32_bundle, "--format", "xml").exit_code == 2
    (tmp_path / "cut.onnx").write_bytes((fp32_bundle / "model.onnx").read_bytes()[:2000])
    result = run(tmp_path / "cut.onnx")
    assert result.exit_code == 3
    assert "cut.onnx" in result.stderr
    assert result.stdout == ""
