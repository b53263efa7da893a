"""Decoders of other exporters, rewritten to llmfast's decoder graph.

onnxruntime-genai's model builder writes GroupQueryAttention too, but its graphs find the lengths of the
sequences in an attention mask, and give logits at every position. Here the lengths become inputs, and
only the last `num_logits` positions reach the head. What else depends on the mask or on positions is
fed from the lengths, so nothing has to be known about it. Weights are not touched.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.errors import UnsupportedError
from llmfast.graph.builder import CONTRIB
from llmfast.graph.feeds import CONTRACT, PAST, present_of
from llmfast.graph.model import COMPUTED_PREFIXES, OnnxModel, live_nodes, reads, walk

ATTENTION = "GroupQueryAttention"
# Its input that holds the total length; the one before holds the length of every sequence.
_TOTAL = 6
# Prefix of the values that are added.
_ADDED = "llmfast."
# Operators between head and logits that treat every position alike: soft caps, scales, casts.
_POINTWISE = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Tanh", "Where"})
_HEADS = frozenset({"FusedMatMul", "MatMul", "MatMulNBits"})


def is_adaptable(graph: onnx.GraphProto) -> bool:
    """Return whether every cache of a graph goes straight through GroupQueryAttention; weights are not needed."""
    names = {value.name for value in graph.input}
    past = {name for name in names if name.startswith(PAST)}
    nodes = [node for node in _attention_nodes(graph) if len(node.input) > _TOTAL]
    seen = {name: output for node in nodes for name, output in zip(node.input[3:5], node.output[1:3], strict=False)}
    return bool(past) and CONTRACT[1] not in names and {name: present_of(name) for name in past} == seen


def adapt(model: OnnxModel) -> OnnxModel:
    """Return a decoder for which `is_adaptable` holds as llmfast's decoder graph.

    Raises:
        UnsupportedError: an input that can't be made from token ids, or a size that the graph does not tell.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    _check_inputs(model)
    for node in _attention_nodes(graph):
        node.input[_TOTAL - 1], node.input[_TOTAL] = "seqlens_k", "total_sequence_length"
    head_sizes = _head_sizes(model)
    _name_rotary_tables(graph)
    _cut_logits(graph, model)
    live = live_nodes(graph)
    needed = {name for node in live for name in reads(node)}
    added: list[onnx.NodeProto] = []
    for value in graph.input:
        if value.name in needed and value.name in _MADE:
            added += _MADE[value.name](value)
    del graph.node[:]
    graph.node.extend([*added, *live])
    _declare(graph, head_sizes)
    return OnnxModel(proto, model.path)


def context_length(graph: onnx.GraphProto) -> int | None:
    """Return the positions that the rotary tables of all layers hold, None when there is none; reads no weights."""
    tables = {node.input[7] for node in _attention_nodes(graph) if len(node.input) > 7}
    shapes = [tensor.dims for tensor in graph.initializer if tensor.name in tables]
    return min((dims[0] for dims in shapes if dims), default=None)


def _attention_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == ATTENTION and node.domain == CONTRIB]


def _check_inputs(model: OnnxModel) -> None:
    known = ("input_ids", "attention_mask", "position_ids")
    for value in model.proto.graph.input:
        if value.name not in known and not value.name.startswith(PAST):
            raise UnsupportedError(
                f"`{model.path}` has an input `{value.name}` that is not made from token ids",
                f"known inputs: {', '.join(known)}, {PAST}*",
            )
        if value.name == "position_ids" and len(value.type.tensor_type.shape.dim) != 2:
            raise UnsupportedError(f"`{model.path}`: `position_ids` is not [batch, seq]", "is it a model of images?")


def _head_sizes(model: OnnxModel) -> dict[str, tuple[int, int]]:
    """Return cache -> (heads, features of a head). The builder leaves the latter open, the projections tell it."""
    graph = model.proto.graph
    widths = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in (*graph.value_info, *graph.input)
        if value.type.tensor_type.shape.dim
    }
    sizes = {}
    for node in _attention_nodes(graph):
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        heads = kv_heads = attributes.get("kv_num_heads", 0)
        if not node.input[1]:  # query, key and value are packed
            heads += attributes.get("num_heads", 0) + kv_heads
        features = widths.get(node.input[2] or node.input[0], 0) // max(1, heads)
        for name in node.input[3:5]:
            size = widths.get(name) or features
            if not size:
                raise UnsupportedError(f"`{model.path}` does not say how many features a head of `{name}` has")
            sizes[name] = (kv_heads, size)
    return sizes


def _name_rotary_tables(graph: onnx.GraphProto) -> None:
    """Name them as llmfast does, so that they don't count as trained weights."""
    tables = {name for node in _attention_nodes(graph) for name in node.input[7:9]}
    stored = [tensor for tensor in graph.initializer if tensor.name in tables]
    renamed = {tensor.name: f"{COMPUTED_PREFIXES[0]}{tensor.name}" for tensor in stored}
    for tensor in stored:
        tensor.name = renamed[tensor.name]
    for node in walk(graph):
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def _cut_logits(graph: onnx.GraphProto, model: OnnxModel) -> None:
    """Let only the last `num_logits` positions reach the head, and give float32."""
    logits = next((value for value in graph.output if value.name == "logits"), onnx.ValueInfoProto())
    dims = logits.type.tensor_type.shape.dim
    producers = {output: node for node in graph.node for output in node.output}
    if "logits" not in producers or len(dims) != 3 or dims[1].dim_value == 1 or not dims[2].dim_value:
        raise UnsupportedError(
            f"`{model.path}` has no output `logits` [batch, seq, vocabulary]",
            "build it without prune_lm_head, exclude_lm_head and the like",
        )
    head = producers["logits"]
    for _ in graph.node:
        inner = [name for name in head.input if name in producers and producers[name].op_type != "Constant"]
        if head.op_type not in _POINTWISE or len(inner) != 1:
            break
        head = producers[inner[0]]
    for name, constant in (("end", np.iinfo(np.int64).max), ("axis", 1)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([constant]), f"{_ADDED}{name}"))
    kept = f"{_ADDED}last"
    if head.op_type in _HEADS and head.input[0] in producers:
        value = head.input[0]
        head.input[0] = kept
    else:
        value = f"{_ADDED}logits"
        _rename_output(producers["logits"], value)
        graph.node.append(helper.make_node("Identity", [kept], ["logits"]))
    slices = [
        helper.make_node("Neg", ["num_logits"], [f"{_ADDED}start"]),
        helper.make_node("Slice", [value, f"{_ADDED}start", f"{_ADDED}end", f"{_ADDED}axis"], [kept]),
    ]
    position = next(index for index, node in enumerate(graph.node) if kept in node.input)
    for node in reversed(slices):
        graph.node.insert(position, node)
    if logits.type.tensor_type.elem_type != TensorProto.FLOAT:
        last = next(node for node in graph.node if "logits" in node.output)
        _rename_output(last, f"{_ADDED}narrow_logits")
        cast = helper.make_node("Cast", [f"{_ADDED}narrow_logits"], ["logits"], to=TensorProto.FLOAT)
        graph.node.append(cast)


def _rename_output(node: onnx.NodeProto, name: str) -> None:
    node.output[list(node.output).index("logits")] = name


def _mask_nodes(mask: onnx.ValueInfoProto) -> list[onnx.NodeProto]:
    """Return what makes the attention mask, all ones: [batch, total]."""
    one = helper.make_tensor("value", mask.type.tensor_type.elem_type, [1], [1])
    return [
        helper.make_node("Constant", [], [f"{_ADDED}row"], value_ints=[-1]),
        helper.make_node("Cast", ["total_sequence_length"], [f"{_ADDED}mask.total"], to=TensorProto.INT64),
        helper.make_node("Reshape", [f"{_ADDED}mask.total", f"{_ADDED}row"], [f"{_ADDED}mask.length"]),
        helper.make_node("Shape", ["input_ids"], [f"{_ADDED}mask.batch"], end=1),
        helper.make_node("Concat", [f"{_ADDED}mask.batch", f"{_ADDED}mask.length"], [f"{_ADDED}mask.shape"], axis=0),
        helper.make_node("ConstantOfShape", [f"{_ADDED}mask.shape"], [mask.name], value=one),
    ]


def _position_nodes(positions: onnx.ValueInfoProto) -> list[onnx.NodeProto]:
    """Return what makes the positions, total - seq ... total - 1: [batch, seq]."""
    dtype = positions.type.tensor_type.elem_type
    return [
        helper.make_node("Constant", [], [f"{_ADDED}step"], value_int=1),
        helper.make_node("Cast", ["total_sequence_length"], [f"{_ADDED}total"], to=TensorProto.INT64),
        helper.make_node("Shape", ["input_ids"], [f"{_ADDED}ids_shape"]),
        helper.make_node("Gather", [f"{_ADDED}ids_shape", f"{_ADDED}step"], [f"{_ADDED}seq"]),
        helper.make_node("Sub", [f"{_ADDED}total", f"{_ADDED}seq"], [f"{_ADDED}past"]),
        helper.make_node("Range", [f"{_ADDED}past", f"{_ADDED}total", f"{_ADDED}step"], [f"{_ADDED}range"]),
        helper.make_node("Expand", [f"{_ADDED}range", f"{_ADDED}ids_shape"], [f"{_ADDED}positions"]),
        helper.make_node("Cast", [f"{_ADDED}positions"], [positions.name], to=dtype),
    ]


# Inputs of other exporters that follow from the lengths.
_MADE = {"attention_mask": _mask_nodes, "position_ids": _position_nodes}


def _declare(graph: onnx.GraphProto, head_sizes: dict[str, tuple[int, int]]) -> None:
    """Write the inputs and outputs of the contract."""
    ids, caches = [], []
    for value in graph.input:
        if value.name == "input_ids":
            ids.append(value)
        elif value.name in head_sizes:
            caches.append((value.name, value.type.tensor_type.elem_type))
    vocab = next(value for value in graph.output if value.name == "logits").type.tensor_type.shape.dim[2]
    make = helper.make_tensor_value_info
    inputs = [
        *ids,
        make("seqlens_k", TensorProto.INT32, ["batch"]),
        make("total_sequence_length", TensorProto.INT32, []),
        make("num_logits", TensorProto.INT64, [1]),
    ]
    outputs = [make("logits", TensorProto.FLOAT, ["batch", "logits", vocab.dim_value])]
    for name, dtype in caches:
        heads, size = head_sizes[name]
        inputs.append(make(name, dtype, ["batch", heads, "past", size]))
        outputs.append(make(present_of(name), dtype, ["batch", heads, "total", size]))
    del graph.input[:], graph.output[:]
    graph.input.extend(inputs)
    graph.output.extend(outputs)
