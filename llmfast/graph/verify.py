"""A decoder graph that checks several tokens at once, each to the bit as if it had come alone.

ONNX Runtime's matrix products and norms give a row the same bits whatever rows are beside it (4-bit ones not on every
processor: whoever verifies compares first), but its GroupQueryAttention sums in another order for one row than for
several. That is a difference in the last bit, which quantized activations turn into other codes and, layer by layer,
into other logits. So for a step that verifies K drafted tokens (`num_logits` = K), every attention node becomes: one
that writes the K keys and values into the cache, with as few query heads as it takes; and K that read the cache, one
row each. They stand in the branch of an `If`; every other step takes the branch with the node as it was, at no
measurable cost.

Operator, with `key` of length 0 for attention that only reads:
https://github.com/microsoft/onnxruntime/blob/main/docs/contrib_ops/cpu/gqa.md
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llmfast.graph.builder import CONTRIB
from llmfast.graph.feeds import PAST
from llmfast.graph.model import OnnxModel

ATTENTION = "GroupQueryAttention"
# Rows of the steps that verify.
ROWS = (2, 4, 8)
# Inputs of the attention node: query (or packed), key, value, two pasts, two lengths, two rotary tables.
_KEY, _PAST, _TOTAL, _ROTARY_END = 1, 3, 6, 9
_OUTPUTS = ("attention", "present key", "present value")
_ADDED = "verify."
_COUNT, _IS_STEP, _LENGTHS, _TOTALS = (f"{_ADDED}{name}" for name in ("count", "is_step", "lengths", "totals"))


def add_verification(model: OnnxModel, rows: Sequence[int] = ROWS) -> onnx.ModelProto | None:
    """Return a decoder's graph with a branch for every number of rows that a step may verify.

    Args:
        model: a decoder of llmfast's own form; not changed.
        rows: numbers of rows, each above 1.

    Returns:
        The model; None when an attention node has inputs that can't be split by rows, or an int8 cache, which
        ONNX Runtime does not only read.
    """
    if not all(_can_split(node) for node in model.proto.graph.node if _is_attention(node)):
        return None
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    caches = {value.name: value for value in graph.input if value.name.startswith(PAST)}
    shared = _Shared(graph, rows)
    nodes = shared.lengths()
    for node in model.proto.graph.node:
        if _is_attention(node):
            nodes.append(_Split(node, caches, shared).choice(rows))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return proto


def _is_attention(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == ATTENTION and node.domain == CONTRIB)


def _can_split(node: onnx.NodeProto) -> bool:
    return not any(node.input[_ROTARY_END:]) and len(node.output) == len(_OUTPUTS)


class _Shared:
    """What the branches of all layers read: constants, and the lengths that each row sees."""

    def __init__(self, graph: onnx.GraphProto, rows: Sequence[int]) -> None:
        self._graph = graph
        self.rows = rows
        self._known: set[str] = set()

    def constant(self, name: str, array: np.ndarray) -> str:
        name = _ADDED + name
        if name not in self._known:
            self._known.add(name)
            self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def lengths(self) -> list[onnx.NodeProto]:
        """Return nodes: is it a step that verifies, and the lengths that rows see, the last row's first."""
        most = max(self.rows)
        table = np.isin(np.arange(most + 2), self.rows)
        less = self.constant("less", np.arange(most, dtype=np.int32))
        return [
            helper.make_node("Squeeze", ["num_logits"], [_COUNT]),
            helper.make_node("Min", [_COUNT, self.constant("over", np.array(most + 1))], [f"{_ADDED}bounded"]),
            helper.make_node("Gather", [self.constant("table", table), f"{_ADDED}bounded"], [_IS_STEP]),
            helper.make_node("Sub", ["seqlens_k", less], [_LENGTHS]),
            helper.make_node("Sub", ["total_sequence_length", less], [_TOTALS]),
        ]


class _Split:
    """One attention node and the branches that take its place."""

    def __init__(self, node: onnx.NodeProto, caches: Mapping[str, onnx.ValueInfoProto], shared: _Shared) -> None:
        self._node = node
        self._shared = shared
        self._is_packed = not node.input[_KEY]
        attributes: dict[str, Any] = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        self._heads, self._kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
        cache = caches[node.input[_PAST]]
        self._cache_type = cache.type.tensor_type.elem_type
        self._head_size = cache.type.tensor_type.shape.dim[3].dim_value

    def choice(self, rows: Sequence[int]) -> onnx.NodeProto:
        """Return the node that takes the original's place."""
        plain = self._branch("plain", [self._copy([*self._node.input], [*self._node.output], "plain", self._heads)])
        return self._if(_IS_STEP, self._branch("step", self._by_count(rows)), plain, "step")

    def _by_count(self, rows: Sequence[int]) -> list[onnx.NodeProto]:
        count, *others = rows
        if not others:
            return self._rows(count)
        wanted = self._shared.constant(f"count{count}", np.array(count))
        is_it = helper.make_node("Equal", [_COUNT, wanted], [f"{_ADDED}is{count}"])
        then, other = self._branch(f"rows{count}", self._rows(count)), self._branch("more", self._by_count(others))
        return [is_it, self._if(f"{_ADDED}is{count}", then, other, f"count{count}")]

    def _rows(self, count: int) -> list[onnx.NodeProto]:
        """Return nodes: write all keys and values, then read them a row at a time."""
        node, name = self._node, self._node.output[0]
        query, size = node.input[0], self._head_size
        width, kept = self._heads * size, self._kv_heads * size
        end = width + 2 * kept if self._is_packed else width
        nodes = [
            self._columns(query, f"{name}.few", width - kept, end),
            self._columns(query, f"{name}.query", 0, width),
            self._copy([f"{name}.few", *node.input[1:]], [f"{name}.unread", *node.output[1:]], "write", self._kv_heads),
        ]
        even = self._shared.constant(f"ones{count}", np.ones(count, np.int64))
        rest = self._shared.constant(f"rest{count}", np.array([1] * count + [max(self._shared.rows) - count]))
        parts = {}
        for value, axis in ((f"{name}.query", 1), (_LENGTHS, 0), (_TOTALS, 0)):
            parts[value] = [f"{name}.{value}.{index}" for index in range(count)]
            is_whole = axis == 1 or count == max(self._shared.rows)
            outputs = [*parts[value], *([] if is_whole else [f"{name}.{value}.rest"])]
            nodes.append(helper.make_node("Split", [value, even if is_whole else rest], outputs, axis=axis))
        queries, lengths, totals = parts.values()
        empty = self._shared.constant(f"empty{kept}", np.zeros((1, 0, kept), np.float32))
        for index, (row, length, total) in enumerate(zip(queries, reversed(lengths), reversed(totals), strict=True)):
            inputs = [row, empty, empty, *node.output[1:], length, total, *node.input[_TOTAL + 1 :]]
            nodes.append(self._copy(inputs, [f"{name}.read{index}"], f"read{index}", self._heads))
        nodes.append(helper.make_node("Concat", [f"{name}.read{i}" for i in range(count)], [name], axis=1))
        return nodes

    def _columns(self, value: str, output: str, start: int, end: int) -> onnx.NodeProto:
        constant = self._shared.constant
        bounds = [constant(f"column{bound}", np.array([bound], np.int64)) for bound in (start, end)]
        return helper.make_node("Slice", [value, *bounds, constant("last_axis", np.array([2], np.int64))], [output])

    def _copy(self, inputs: list[str], outputs: list[str], role: str, num_heads: int) -> onnx.NodeProto:
        copy = onnx.NodeProto()
        copy.CopyFrom(self._node)
        copy.name = f"{self._node.name}.{role}"
        copy.input[:], copy.output[:] = inputs, outputs
        next(entry for entry in copy.attribute if entry.name == "num_heads").i = num_heads
        return copy

    def _if(self, condition: str, then: onnx.GraphProto, other: onnx.GraphProto, role: str) -> onnx.NodeProto:
        name = f"{self._node.name}.{role}"
        return helper.make_node("If", [condition], [*self._node.output], name, then_branch=then, else_branch=other)

    def _branch(self, name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        """Return a graph whose values have names of their own, those apart that come from outside."""
        made = {value for node in nodes for value in node.output}
        for node in nodes:
            for values in (node.input, node.output):
                values[:] = [f"{value}.{name}" if value in made else value for value in values]
        shape = [1, "seq", self._heads * self._head_size]
        cache = [1, self._kv_heads, "capacity", self._head_size]
        attention, *caches = (f"{value}.{name}" for value in self._node.output)
        outputs = [helper.make_tensor_value_info(attention, TensorProto.FLOAT, shape)]
        outputs += [helper.make_tensor_value_info(value, self._cache_type, cache) for value in caches]
        return helper.make_graph(nodes, f"{self._node.name}.{name}", [], outputs)
