"""Running a graph over calibration samples piece by piece, with weights that may change on the way.

The graph is cut at the inputs of its linear layers. A piece runs over all samples before the next one does,
and what later pieces need is kept in between; so every node runs once per sample, a layer can be quantized
before those after it see their inputs, and no more than one piece's weights are open at a time.
Memory: the values that cross one cut, for a decoder its residual stream and the layer's input, times the samples.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from llmfast.graph.feeds import sequence_feeds
from llmfast.graph.model import OnnxModel, live_nodes, reads
from llmfast.runtime import open_session

Values = dict[str, np.ndarray]


class Replay:
    """A run of a graph that stops where it is told to.

    Args:
        model: the float graph.
        samples: token ids, int64 [seq] each.
        replaced: initializer -> a function that returns it, as the graph stores it; looked up when it is needed, and
            then taken out, for it may hold a whole weight.
    """

    def __init__(
        self, model: OnnxModel, samples: Sequence[np.ndarray], replaced: dict[str, Callable[[], np.ndarray]]
    ) -> None:
        self._model = model
        self._samples = samples
        self._replaced = replaced
        self._nodes = live_nodes(model.proto.graph)
        self._made_by = {name: index for index, node in enumerate(self._nodes) for name in node.output if name}
        self._last_reader = {name: index for index, node in enumerate(self._nodes) for name in reads(node)}
        self._values: list[Values] = [{} for _ in samples]
        self._next = 0

    def is_past(self, name: str) -> bool:
        """Return whether a value was forgotten on the way."""
        return self._made_by.get(name, -1) < self._next and any(name not in values for values in self._values)

    def until(self, name: str) -> list[np.ndarray]:
        """Run until a value is there, and return it for every sample.

        Values must be asked for in the graph's order: those not needed later are forgotten.

        Raises:
            UnsupportedError: an input of the graph that can't be made from token ids.
        """
        if name not in self._made_by:  # an input of the graph
            inputs = [value for value in self._model.proto.graph.input if value.name == name]
            return [sequence_feeds(inputs, ids[None])[name] for ids in self._samples]
        stop = self._made_by[name] + 1
        if stop > self._next:
            self._run(self._nodes[self._next : stop], name, stop)
            self._next = stop
        return [values[name] for values in self._values]

    def _run(self, nodes: list[onnx.NodeProto], name: str, stop: int) -> None:
        made = [output for node in nodes for output in node.output]
        wanted = [value for value in made if value and (value == name or self._last_reader.get(value, -1) >= stop)]
        needed = list(dict.fromkeys(value for node in nodes for value in reads(node) if value and value not in made))
        session = open_session(self._model.path, spin=False, graph=self._piece(nodes, needed, wanted))
        public = {value.name for value in self._model.proto.graph.input}
        inputs = [value for value in session.get_inputs() if value.name in public]
        inner = [value.name for value in session.get_inputs() if value.name not in public]
        for number, ids in enumerate(self._samples):
            values = self._values[number]
            feeds = sequence_feeds(inputs, ids[None]) | {value: values[value] for value in inner}
            results = session.run(wanted, feeds)
            kept = {value: array for value, array in values.items() if self._last_reader.get(value, -1) >= stop}
            self._values[number] = kept | dict(zip(wanted, results, strict=True))
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
                kind = helper.np_dtype_to_tensor_dtype(self._values[0][name].dtype)
                piece.input.append(helper.make_tensor_value_info(name, kind, None))
        piece.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)  # ONNX Runtime infers their types
        proto = onnx.ModelProto(graph=piece, ir_version=self._model.proto.ir_version)
        proto.opset_import.extend(self._model.proto.opset_import)
        serialized: Any = proto.SerializeToString()
        return bytes(serialized)
