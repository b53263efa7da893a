"""Writing an ONNX graph node by node."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import llmfast
from llmfast.graph.model import OnnxModel
from llmfast.graph.weights import WeightFile

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators


class GraphBuilder:
    """Collects nodes and initializers; every method returns the names of the values it makes.

    Args:
        weights: where initializers are stored as they are added; None adds nodes only.
        opset: version of the standard operators that the nodes are written for.
    """

    def __init__(self, weights: WeightFile | None = None, opset: int = OPSET) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self._weights = weights
        self._initializers: dict[str, TensorProto] = {}
        self._values: set[str] = set()

    def has(self, value: str) -> bool:
        """Return whether a node added so far makes this value."""
        return value in self._values

    def op(self, op_type: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, named after it, and return the output's name."""
        return self.ops(op_type, inputs, [output], domain, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; an empty name is an output that nobody needs."""
        name = next(output for output in outputs if output)
        self.keep(helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes))
        return list(outputs)

    def weight(self, name: str, array: np.ndarray) -> str:
        """Store an initializer; a name that several layers share is stored once."""
        if name not in self._initializers:
            assert self._weights is not None
            self._initializers[name] = self._weights.add(name, array)
        return name

    def keep(self, node: onnx.NodeProto) -> None:
        """Add a node as it is."""
        self.nodes.append(node)
        self._values.update(node.output)

    def constant(self, name: str, values: Any, dtype: type = np.int64) -> str:
        """Store a small constant, a shape or an axis for instance."""
        return self.weight(name, np.array(values, dtype))

    def rewrite(self, model: OnnxModel) -> onnx.ModelProto:
        """Return `model` with its nodes and initializers replaced by those added so far."""
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        proto.ir_version = max(proto.ir_version, IR_VERSION)
        proto.producer_name, proto.producer_version = "llmfast", llmfast.__version__
        for domain in {node.domain for node in self.nodes} - {entry.domain for entry in proto.opset_import}:
            proto.opset_import.append(helper.make_opsetid(domain, 1))
        del proto.graph.node[:]
        proto.graph.node.extend(self.nodes)
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(self._initializers.values())
        kept = [value for value in proto.graph.value_info if value.name in self._values]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)  # ONNX Runtime fuses nodes only where it knows their shapes
        return proto

    def reduce_max(self, value: str, output: str) -> str:
        """Add the maximum over the last axis, which is kept; the axis became an input with opset 18."""
        if self.opset < 18:
            return self.op("ReduceMax", [value], output, axes=[-1], keepdims=1)
        return self.op("ReduceMax", [value, self.constant("last_axis", [-1])], output, keepdims=1)

    def build(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """Return the model made of everything added so far."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self._initializers.values()))
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset), helper.make_opsetid(CONTRIB, 1)],
            ir_version=IR_VERSION,
            producer_name="llmfast",
            producer_version=llmfast.__version__,
        )
