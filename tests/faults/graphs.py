"""Small ONNX graphs to damage."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 64


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, name=f"the_{kind}", **attributes)


def weight(name: str = "weight") -> TensorProto:
    values = np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32)
    return numpy_helper.from_array(values, name)


def model(
    nodes: list[onnx.NodeProto] | None = None,
    constants: list[TensorProto] | None = None,
    opset: int = 21,
    ir_version: int = 10,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    """Return `y = x @ weight` and what is added to it."""
    graph = helper.make_graph(
        [node("MatMul", ["x", "weight"], ["y"]), *(nodes or [])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", SIZE])],
        [weight(), *(constants or [])],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=functions or [])


def save(folder: Path, proto: onnx.ModelProto | None = None, name: str = "model.onnx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes((proto or model()).SerializeToString())
    return path


def save_external(folder: Path, data: bytes | None = None, **entries: object) -> Path:
    """Write the graph with its weight in `weights.data`; `entries` replace what it says of that, None removes."""
    proto = model()
    (tensor,) = proto.graph.initializer
    content = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    said = {"location": "weights.data", "offset": 0, "length": len(content)} | entries
    for key, value in said.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.data").write_bytes(content if data is None else data)
    return save(folder, proto)


def nested(depth: int) -> bytes:
    """Return a model with an If in an If in an If, as bytes: libraries refuse to write many of them."""
    graph = helper.make_graph([helper.make_node("Identity", ["y"], ["inner"])], "leaf", [], []).SerializeToString()
    for _ in range(depth):
        attribute = _field(1, b"then_branch") + _field(6, graph) + bytes([20 << 3 & 0x7F | 0x80, 1, 5])  # type: GRAPH
        graph = _field(1, _field(4, b"If") + _field(5, attribute))
    whole = model()
    whole.graph.ClearField("node")
    return whole.SerializeToString() + _field(7, graph)  # the two graphs are merged


def _field(number: int, value: bytes) -> bytes:
    size, length = len(value), b""
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def function(name: str, calls: str, outputs: int = 1) -> onnx.FunctionProto:
    """Return a function of the domain `local` that calls another one, or an operator of ONNX."""
    domain = "" if calls[0].isupper() else "local"
    return helper.make_function(
        "local",
        name,
        ["a"],
        [f"b{index}" for index in range(outputs)],
        [helper.make_node(calls, ["a"], [f"b{index}"], domain=domain) for index in range(outputs)],
        [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)],
    )
