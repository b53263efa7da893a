"""Running a graph over calibration samples piece by piece, with weights that may change on the way.

The graph is cut at the inputs of its linear layers. A piece runs over all samples before the next one does,
and what later pieces need is kept in between; so every node runs once per sample, a layer can be quantized
before those after it see their inputs, and no more than one piece's weights are open at a time.
What crosses a cut, for a decoder its residual stream and the layer's input, goes to disk when there is much of it:
memory does not grow with the samples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from llmfast.graph.model import OnnxModel, live_nodes, reads
from llmfast.quantize.spool import Spool
from llmfast.runtime import open_session


class Replay:
    """A run of a graph that stops where it is told to.

    Args:
        model: the float graph.
        samples: the graph's inputs, of each sample.
        replaced: initializer -> a function that returns it, as the graph stores it; looked up when it is needed, and
            then taken out, for it may hold a whole weight.
    """

    def __init__(
        self,
        model: OnnxModel,
        samples: Sequence[Mapping[str, np.ndarray]],
        replaced: dict[str, Callable[[], np.ndarray]],
    ) -> None:
        self._model = model
        self._samples = samples
        self._replaced = replaced
        self._nodes = live_nodes(model.proto.graph)
        self._made_by = {name: index for index, node in enumerate(self._nodes) for name in node.output if name}
        self._last_reader = {name: index for index, node in enumerate(self._nodes) for name in reads(node)}
        self._spool = Spool()
        self._held: set[str] = set()
        self._next = 0

    def is_past(self, name: str) -> bool:
        """Return whether a value was forgotten on the way."""
        return self._made_by.get(name, self._next) < self._next and name not in self._held

    def until(self, name: str) -> Iterable[np.ndarray]:
        """Run until a value is there, and return it for every sample, each read when it is looked at.

        Values must be asked for in the graph's order: those not needed later are forgotten. What the same node makes
        beside this one can be asked for next.
        """
        if name not in self._made_by:  # an input of the graph
            return [values[name] for values in self._samples]
        stop = self._made_by[name] + 1
        if stop > self._next:
            self._run(self._nodes[self._next : stop], stop)
            self._next = stop
        return self._spool.column(name, len(self._samples))

    def _run(self, nodes: list[onnx.NodeProto], stop: int) -> None:
        made = [output for node in nodes for output in node.output]
        asked = set(nodes[-1].output)
        wanted = [value for value in made if value and (value in asked or self._last_reader.get(value, -1) >= stop)]
        needed = list(dict.fromkeys(value for node in nodes for value in reads(node) if value and value not in made))
        session = open_session(self._model.path, spin=False, graph=self._piece(nodes, needed, wanted))
        inputs = [value.name for value in session.get_inputs()]
        for number, values in enumerate(self._samples):
            feeds = {value: values[value] if value in values else self._spool.get(number, value) for value in inputs}
            for value, array in zip(wanted, session.run(wanted, feeds), strict=True):
                self._spool.put(number, value, array)
        self._held.update(wanted)
        for value in [value for value in self._held - asked if self._last_reader.get(value, -1) < stop]:
            self._held.remove(value)
            for number in range(len(self._samples)):
                self._spool.drop(number, value)
        for value in needed:
            if self._last_reader[value] < stop:
                self._replaced.pop(value, None)

    def _piece(self, nodes: list[onnx.NodeProto], needed: Iterable[str], wanted: Iterable[str]) -> bytes:
        graph = self._model.proto.graph
        inputs = {value.name: value for value in graph.input}
        initializers = self._model.initializers
        piece = onnx.GraphProto(name="piece", node=nodes)
        for name in needed:
            if name in self._replaced:
                piece.initializer.append(numpy_helper.from_array(np.ascontiguousarray(self._replaced[name]()), name))
            elif name in initializers:
                piece.initializer.append(initializers[name])
            elif name in inputs:
                piece.input.append(inputs[name])
            elif name in self._made_by:
                kind = helper.np_dtype_to_tensor_dtype(self._spool.get(0, name).dtype)
                piece.input.append(helper.make_tensor_value_info(name, kind, None))
        piece.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)  # ONNX Runtime infers their types
        proto = onnx.ModelProto(graph=piece, ir_version=self._model.proto.ir_version)
        proto.opset_import.extend(self._model.proto.opset_import)
        serialized: Any = proto.SerializeToString()
        return bytes(serialized)
