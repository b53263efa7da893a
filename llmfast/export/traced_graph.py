"""A traced program as llmfast's model.onnx: the checkpoint's names, shapes that can be inferred, no dead ends."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from llmfast.graph.model import live_nodes, walk
from llmfast.graph.weights import WeightFile

if TYPE_CHECKING:
    import torch

Shape = tuple[int | str | None, ...]  # a number, the name of a free dimension, or unknown


def write_graph(model: Any, parameters: "Mapping[str, torch.Tensor]", staged: Path) -> None:
    """Write what PyTorch's exporter made.

    Args:
        model: the exporter's result, an `onnx_ir.Model`; its initializers are taken out.
        parameters: the PyTorch model's weights by the checkpoint's names.
        staged: the directory to write to.
    """
    import onnx_ir

    arrays = _take_weights(model, parameters)
    proto: onnx.ModelProto = onnx_ir.to_proto(model)
    arrays |= _fix_reshapes(proto.graph)
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
    """Take the initializers out of a traced graph, which goes on to use them under the checkpoint's names."""
    # The exporter stores linear weights transposed, under names of its own (`val_64`).
    transposed = {_digest(tensor.detach().numpy().T): name for name, tensor in parameters.items() if tensor.ndim == 2}
    arrays = {}
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        del initializers[value.name]
        array = value.const_value.numpy()
        known = transposed.get(_digest(array)) if array.ndim == 2 else None
        value.name = known or value.name.removeprefix("model.")
        arrays[value.name] = array
    return arrays


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
