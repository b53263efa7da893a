"""What each node of a graph is part of: a layer by its role, attention, norms, activations, quantizing, the rest.

Profilers report nodes. Roles come from weights and operators, never from the names that exporters number.
"""

import re
from collections.abc import Iterator, Mapping

import onnx

from llmfast.graph.census import layer_name
from llmfast.graph.linear import role_of
from llmfast.graph.model import OnnxModel
from llmfast.graph.view import GraphView

_KINDS = {
    "attention": re.compile(r"Attention|^Softmax$|^RotaryEmbedding$|RelativePositionBias"),
    "norm": re.compile(r"Normalization$"),
    "activation": re.compile(r"Gelu|Relu|Elu$|Silu|Swish|^Sigmoid$|^Tanh$|^Erf$|^Softplus$|^Mish$|SwiGLU"),
    "convolution": re.compile(r"Conv"),
    "quantizing": re.compile(r"uantizeLinear$"),
    "copies between devices": re.compile(r"^Memcpy"),
    "layout": re.compile(r"^(Reshape|Transpose|Squeeze|Unsqueeze|Concat|Slice|Split|Expand|Flatten|Reorder\w+|Pad)$"),
    "elementwise": re.compile(r"^(Add|Sub|Mul|Div|Where|Cast|Clip|Neg|Pow|Sqrt)$"),
}
_EMBEDDINGS = ("Gather", "GatherBlockQuantized")
# Multiplications, and where their weight is.
_MULTIPLICATIONS = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulInteger"), 1),
    **{"MatMulIntegerToFloat": 1, "QLinearMatMul": 3},
}
# What a layer's bias and scales are applied with.
_APPLIED = ("Add", "Mul", "Cast")
# What scales are computed of: the largest value of a row, then a division by the number of steps.
_SCALING = ("Mul", "Div", "Max", "Clip", "Cast", "Reshape", "Sub")
_UNNAMED = re.compile(r"^(onnx::)?(node_)?(MatMul|Gemm|linear|matmul|val|n)?_?\d*$", re.IGNORECASE)
# What ONNX Runtime appends to the name of a node that it fuses, replaces or repeats.
_APPENDED = re.compile(r"(/[A-Z]\w*/?|[_ ][^/._ ]*)$")


def name_parts(model: OnnxModel) -> dict[str, str]:
    """Return node name -> what it is part of, for the nodes that have a name.

    Layers are named by their role (`query`, `down_proj`; see `role_of`), with the nodes that add their bias and apply
    their scales. A head that shares the embedding's table has its node's name. Other nodes are of a kind: `embedding`,
    `attention`, `norm`, `activation`, `convolution`, `quantizing`, `layout`,
    `elementwise`, `other`.
    """
    view = GraphView(model)
    parts: dict[str, str] = {}  # by the first output
    scales = {node.output[0] for node in _scale_nodes(view)}
    for node in view.nodes:
        maker = next((name for name in node.input if name in parts and node.op_type in _APPLIED), None)
        if node.output[0] in scales:
            parts[node.output[0]] = "quantizing"
        elif node.op_type in _MULTIPLICATIONS:
            parts[node.output[0]] = _part_of_multiplication(view, node)
        elif node.op_type in _EMBEDDINGS and _weight(view, node.input[0]):
            parts[node.output[0]] = "embedding"
        elif maker is not None and _only_applies(view, node, maker, scales):
            parts[node.output[0]] = parts[maker]
    return {node.name: parts.get(node.output[0], kind_of(node.op_type)) for node in view.nodes if node.name}


def find_part(parts: Mapping[str, str], name: str, operator: str) -> str:
    """Return what a node that ran is part of.

    Args:
        parts: of the graph as it was before ONNX Runtime optimised it.
        name: of the node, which may stand for several that were fused.
        operator: the node's.
    """
    while name and name != operator:
        if name in parts:
            return parts[name]
        name, shorter = _APPENDED.sub("", name), name
        if name == shorter:
            break
    return kind_of(operator)


def kind_of(operator: str) -> str:
    """Return the kind of work that an operator does, whatever layer it is in; `other` where it tells nothing."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(operator)), "other")


def _part_of_multiplication(view: GraphView, node: onnx.NodeProto) -> str:
    weight = _weight(view, node.input[_MULTIPLICATIONS[node.op_type]])
    if not weight:
        return "attention"  # two activations: scores, and values by their weights
    is_tied = any(reader.op_type in _EMBEDDINGS and reader.input[0] == weight for reader in view.readers[weight])
    role = role_of(node.name.strip("/").replace("/", ".") if is_tied else layer_name(node, weight))
    return "unnamed linear layers" if _UNNAMED.match(role) else role


def _weight(view: GraphView, name: str) -> str:
    """Return the initializer that a value is made of, also as codes; empty where it is computed."""
    source = view.maker(view.origin(name), "DequantizeLinear")
    name = view.origin(source.input[0] if source is not None else name)
    return name if name in view.model.initializers else ""


def _scale_nodes(view: GraphView) -> Iterator[onnx.NodeProto]:
    """Yield what computes the scales of activations at run time."""
    for quantizer in view.of_type("QuantizeLinear"):
        waiting = list(quantizer.input[1:])
        while waiting:
            node = view.producers.get(waiting.pop())
            if node is None:
                continue
            if node.op_type in ("ReduceMax", "ReduceMin"):
                yield from (node, *filter(None, [view.maker(node.input[0], "Abs")]))
            elif node.op_type in (*_SCALING, "QuantizeLinear"):
                yield node
                waiting += [name for name in node.input if name not in view.model.initializers]


def _only_applies(view: GraphView, node: onnx.NodeProto, made: str, scales: set[str]) -> bool:
    """Return whether all that a node combines a layer's result with are constants and scales."""
    return all(name == made or name in scales or _weight(view, name) for name in node.input)
