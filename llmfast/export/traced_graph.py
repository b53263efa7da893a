"""A traced program as llmfast's model.onnx: the checkpoint's names, shapes that can be inferred, no dead ends."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from llmfast.graph.builder import CONTRIB
from llmfast.graph.model import live_nodes, walk
from llmfast.graph.weights import WeightFile

if TYPE_CHECKING:
    import torch

_TRANSPOSED = ".T"

Shape = tuple[int | str | None, ...]  # a number, the name of a free dimension, or unknown


def write_graph(
    model: Any, parameters: "Mapping[str, torch.Tensor]", staged: Path, free: Mapping[str, str] | None = None
) -> None:
    """Write what PyTorch's exporter made.

    Args:
        model: the exporter's result, an `onnx_ir.Model`; its initializers are taken out.
        parameters: the PyTorch model's weights by the checkpoint's names.
        staged: the directory to write to.
        free: names of free dimensions for the exporter's own (`s77`).
    """
    import onnx_ir

    arrays = _take_weights(model, parameters)
    proto: onnx.ModelProto = onnx_ir.to_proto(model)
    _rename_dimensions(proto.graph, free or {})
    _name_layers(proto.graph, parameters)
    arrays |= _fix_reshapes(proto.graph)
    _share_tables(proto, arrays)
    live = live_nodes(proto.graph)
    del proto.graph.node[:]
    proto.graph.node.extend(live)
    _strip(proto)
    used = {name for node in walk(proto.graph) for name in node.input}
    weights = WeightFile(staged)
    for name, array in arrays.items():
        if name in used:
            proto.graph.initializer.append(weights.add(name, array))
    weights.save(proto)


def _take_weights(model: Any, parameters: "Mapping[str, torch.Tensor]") -> dict[str, np.ndarray]:
    """Take the initializers out of a traced graph, which goes on to use them under the checkpoint's names.

    The exporter stores linear weights transposed, under names of its own (`val_64`). One that is another
    initializer transposed, as the head of a language model is of its embedding, gets the name of that with `.T`.
    """
    matrices = {name: tensor.detach().numpy() for name, tensor in parameters.items() if tensor.ndim == 2}
    as_is = {_digest(matrix): name for name, matrix in matrices.items()}
    transposed = {_digest(matrix.T): name for name, matrix in matrices.items()}
    initializers = model.graph.initializers
    arrays = {value: value.const_value.numpy() for value in initializers.values()}
    digests = {value: _digest(array) for value, array in arrays.items() if array.ndim == 2}
    stored = {as_is[digest] for digest in digests.values() if digest in as_is}
    for value in arrays:
        digest = digests.get(value, b"")
        del initializers[value.name]
        if digest in as_is:
            value.name = as_is[digest]
        elif digest in transposed:
            name = transposed[digest]
            value.name = f"{name}{_TRANSPOSED}" if name in stored else name
        else:
            value.name = value.name.removeprefix("model.")
    return {value.name: array for value, array in arrays.items()}


def _share_tables(proto: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> None:
    """Let a MatMul with a transposed copy of a table multiply by the table itself, and drop the copy."""
    for node in proto.graph.node:
        table = node.input[1].removesuffix(_TRANSPOSED) if len(node.input) > 1 else ""
        if node.op_type == "MatMul" and f"{table}{_TRANSPOSED}" == node.input[1] and table in arrays:
            node.op_type, node.domain, node.input[1] = "FusedMatMul", CONTRIB, table
            node.attribute.append(onnx.helper.make_attribute("transB", 1))
    if any(node.domain == CONTRIB for node in proto.graph.node):
        proto.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))


def _rename_dimensions(graph: onnx.GraphProto, free: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.value_info, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                size.dim_param = re.sub(r"\w+", lambda symbol: free.get(symbol[0], symbol[0]), size.dim_param)


def _name_layers(graph: onnx.GraphProto, parameters: "Mapping[str, torch.Tensor]") -> None:
    """Name a layer after its weight where that is a bare parameter, so not called `<layer>.weight`."""
    for node in graph.node:
        weight = node.input[1] if node.op_type in ("MatMul", "Gemm") else ""
        if weight in parameters and not weight.endswith(".weight"):
            node.name = weight


def _fix_reshapes(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Give each Reshape a constant shape where the traced shapes allow it, and return these constants.

    The exporter computes [batch, sequence, heads, head_size] with Shape and Concat, which ONNX Runtime's
    shape inference can't follow; it then fuses no SkipLayerNormalization. [0, 0, heads, head_size] it can.
    """
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    constants = {}
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        before, after = shapes.get(node.input[0], ()), shapes.get(node.output[0], ())
        target = [
            size if isinstance(size, int) else 0 if size is not None and before[axis : axis + 1] == (size,) else -1
            for axis, size in enumerate(after)
        ]
        if target and target.count(-1) <= 1 and 0 not in after:
            node.input[1] = "shape_" + "_".join(str(size) for size in target).replace("-", "m")
            constants[node.input[1]] = np.array(target, np.int64)
            del node.attribute[:]  # `allowzero`, under which 0 would not mean a copied size
    return constants


def _shape(value: onnx.ValueInfoProto) -> Shape:
    sizes = value.type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else size.dim_param or None for size in sizes)


def _strip(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes: lines of Python with paths of this machine, and the shapes of weights.

    The shapes of inner values stay: some models (MPNet's position bias) hide them from ONNX Runtime.
    """
    graph = proto.graph
    values = {name for node in graph.node for name in node.output}
    shapes = [value for value in graph.value_info if value.name in values]
    del graph.value_info[:]
    graph.value_info.extend(shapes)
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def _digest(array: Any) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest() + repr(array.shape).encode()
