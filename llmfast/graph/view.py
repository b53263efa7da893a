"""A graph to look at: who makes and who reads each value, and of what type it is."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import TypeVar

import onnx
from onnx import TensorProto, helper

from llmfast.graph.model import OnnxModel, walk

Number = TypeVar("Number", int, float)

# Nodes between a weight and the multiplication that uses it.
_PASSES = ("Transpose", "Identity", "Cast", "Reshape")


class GraphView:
    """A graph with who makes and who reads each value, and the types that it states."""

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self.nodes = list(walk(model.proto.graph))
        self.producers = {output: node for node in self.nodes for output in node.output if output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    @cached_property
    def types(self) -> dict[str, int]:
        """Element type of every value that the graph states."""
        graph = self.model.proto.graph
        stated = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
        return stated | {name: tensor.data_type for name, tensor in self.model.initializers.items()}

    def type_of(self, name: str) -> int:
        """Return a value's element type, also of a quantizer's output; 0 when unknown."""
        node = self.producers.get(name)
        if node is None or name in self.types:
            return self.types.get(name, 0)
        if node.op_type == "DynamicQuantizeLinear":
            return int(TensorProto.UINT8)
        if node.op_type == "QuantizeLinear":
            return self.type_of(node.input[2]) if len(node.input) > 2 and node.input[2] else int(TensorProto.UINT8)
        return self.type_of(node.input[0]) if node.op_type in (*_PASSES[:2], "Reshape", "Squeeze") else 0

    def origin(self, name: str) -> str:
        """Follow a value to what it is made of, through nodes that only change its form."""
        while name in self.producers and self.producers[name].op_type in _PASSES:
            name = self.producers[name].input[0]
        return name

    def of_type(self, *op_types: str) -> Iterator[onnx.NodeProto]:
        """Yield the nodes of some operators."""
        return (node for node in self.nodes if node.op_type in op_types)

    def maker(self, name: str, *op_types: str) -> onnx.NodeProto | None:
        """Return the node that makes a value if it is one of some operators."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type in op_types else None


def attribute(node: onnx.NodeProto, name: str, default: Number) -> Number:
    """Return a number among a node's attributes."""
    for entry in node.attribute:
        if entry.name == name:
            return type(default)(helper.get_attribute_value(entry))
    return default


def input_at(node: onnx.NodeProto, index: int) -> str:
    """Return an input's name, empty where the node does not have it."""
    return str(node.input[index]) if index < len(node.input) else ""
