"""Rotating a decoder's residual stream, and the values of its attention heads, without changing the function.

The stream x is what embeddings start, linear layers add to and norms read. With an orthogonal R, x R has the same
root mean square as x; so if everything that writes x writes x R, and everything that reads it through a norm
without a weight of its own reads (x / rms) R, nothing changes but the spread of outliers over channels.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx

from llmfast.errors import UnsupportedError
from llmfast.graph.edits import Change, Edits
from llmfast.graph.linear import Embedding, Linear
from llmfast.graph.model import OnnxModel, reads

_NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2, "RMSNormalization": 1}


@dataclass
class ResidualStream:
    """The parts of a graph that touch its residual stream.

    Attributes:
        width: channels of the stream.
        embeddings: tables whose rows start it.
        writers: layers whose outputs are added to it.
        biases: vectors `[width]` added to it.
        readers: layers that multiply a norm of it, and that norm's weight.
    """

    width: int
    embeddings: list[Embedding] = field(default_factory=list)
    writers: list[Linear] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    readers: list[tuple[Linear, str]] = field(default_factory=list)


def find_residual_stream(model: OnnxModel, linears: list[Linear], embeddings: list[Embedding]) -> ResidualStream:
    """Follow the residual stream through a graph.

    Args:
        model: the graph.
        linears: all its linear layers.
        embeddings: all its tables.

    Raises:
        UnsupportedError: there is no stream, or something reads or writes it that can't be rotated.
    """
    if not embeddings:
        raise UnsupportedError(f"`{model.path}` can't be rotated: it has no embedding table that starts a stream")
    return _Follower(model, linears, embeddings).follow()


class _Follower:
    def __init__(self, model: OnnxModel, linears: list[Linear], embeddings: list[Embedding]) -> None:
        self._model = model
        self._found = ResidualStream(embeddings[0].shape[1])
        self._layer_of = {linear.output: linear for linear in linears}
        self._table_of = {table.node.output[0]: table for table in embeddings}
        self._made = {name: node for node in model.proto.graph.node for name in node.output if name}
        self._stream: set[str] = set()
        self._normed: dict[str, str] = {}

    def follow(self) -> ResidualStream:
        for node in self._model.proto.graph.node:
            touched = [name for name in reads(node) if name in self._stream or name in self._normed]
            if node.output[0] in self._table_of:
                self._found.embeddings.append(self._table_of[node.output[0]])
                self._stream.add(node.output[0])
            elif touched:
                self._pass(node)
        for output in self._model.proto.graph.output:
            if output.name in self._stream or output.name in self._normed:
                raise self._refusal(f"its output `{output.name}` is the residual stream")
        if not self._found.writers or not self._found.readers:
            raise self._refusal("no linear layers read and write a residual stream")
        self._check_shared()
        return self._found

    def _pass(self, node: onnx.NodeProto) -> None:
        linear = self._layer_of.get(node.output[0])
        if linear is not None and linear.input in self._normed:
            self._found.readers.append((linear, self._normed[linear.input]))
        elif node.op_type in _NORMS and self._is_vector(node.input[_NORMS[node.op_type]]):
            summands = node.input[: _NORMS[node.op_type]]
            for name in summands:
                self._write(node, name)
            if len(node.input) > 3 and node.input[3]:  # SkipSimplifiedLayerNormalization's bias
                self._found.biases.append(node.input[3])
            self._normed[node.output[0]] = node.input[_NORMS[node.op_type]]
            self._stream.update(name for name in node.output[3:4] if name)
        elif node.op_type == "Add":
            for name in node.input:
                self._write(node, name)
            self._stream.add(node.output[0])
        elif node.op_type == "Identity" or (node.op_type == "Slice" and self._keeps_channels(node)):
            if node.input[0] in self._stream:
                self._stream.add(node.output[0])
            else:
                self._normed[node.output[0]] = self._normed[node.input[0]]
        else:
            raise self._refusal(f"`{node.name or node.output[0]}` ({node.op_type}) reads the residual stream")

    def _write(self, node: onnx.NodeProto, name: str) -> None:
        """Note what makes a summand of the stream: a layer, or a layer and its bias."""
        if name in self._stream:
            return
        made = self._made.get(name)
        bias = ""
        if made is not None and made.op_type == "Add" and any(self._is_vector(one) for one in made.input):
            bias = next(one for one in made.input if self._is_vector(one))
            name = next((one for one in made.input if one != bias), "")
        linear = self._layer_of.get(name)
        if linear is None:
            what = node.name or node.output[0]
            raise self._refusal(f"`{what}` adds `{name}` to the residual stream, which is no linear layer's output")
        self._found.writers.append(linear)
        self._found.biases += [one for one in (bias, linear.bias) if one]

    def _keeps_channels(self, node: onnx.NodeProto) -> bool:
        axes = self._model.initializers.get(node.input[3]) if len(node.input) > 3 else None
        return axes is not None and set(self._model.read(axes).tolist()) <= {0, 1}

    def _is_vector(self, name: str) -> bool:
        tensor = self._model.initializers.get(name)
        return tensor is not None and list(tensor.dims) == [self._found.width]

    def _check_shared(self) -> None:
        """Refuse weights with two parts to play; a head may share the embedding's table."""
        found = self._found
        tables = {table.weight for table in found.embeddings}
        rows = [linear.weight for linear in found.writers]
        columns = [linear.weight for linear, _ in found.readers if linear.weight not in tables]
        everything = [*tables, *rows, *columns, *found.biases]
        twice = next((name for name in everything if everything.count(name) > 1), None)
        if twice is not None:
            raise self._refusal(f"several layers share the weight `{twice}`")

    def _refusal(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"`{self._model.path}` can't be rotated: {reason}",
            "rotate is for decoders with RMS norms whose residual stream only linear layers read and write",
        )


def rotate_stream(edits: Edits, stream: ResidualStream, rotation: np.ndarray) -> None:
    """Rotate the residual stream by `rotation`, float32 [width, width], and fold the norms' weights into the readers.

    A head that shares the embedding's table keeps it, rotated as an embedding: the caller gives it `head_rotation`.
    """
    tables = {table.weight for table in stream.embeddings}
    for table in tables:
        edits.add(table, _times(rotation))
    for linear in stream.writers:
        edits.add(linear.weight, lambda weight: rotation.T @ weight)
    for bias in stream.biases:
        edits.add(bias, _times(rotation))
    for linear, norm in stream.readers:
        if linear.weight not in tables:
            scaled_rotation = edits.read_stored(norm)[:, None] * rotation
            edits.add(linear.weight, _times(scaled_rotation))
    for norm in dict.fromkeys(norm for _, norm in stream.readers):
        edits.add(norm, np.ones_like)


def _times(matrix: np.ndarray) -> Change:
    return lambda array: np.asarray(array @ matrix)


def head_rotation(edits: Edits, norm: str, rotation: np.ndarray) -> np.ndarray:
    """Return the matrix `[width, width]` to put between a norm, once its weight is 1, and a head that stays tied.

    With the norm's weight g: R^T diag(g) R, since (n R) R^T diag(g) R (E R)^T = n diag(g) E^T. Ask before rotating.
    """
    return np.asarray((rotation.T * edits.read_stored(norm)) @ rotation)


@dataclass(frozen=True)
class ValueHeads:
    """The two layers around an attention's values, whose heads can be rotated.

    Attributes:
        value: the layer that makes the values, among other things perhaps.
        start: its first row that does.
        bias: vector added to its output, or empty.
        output: the layer that multiplies the attended values.
        shape: (key-value heads, head size).
    """

    value: Linear
    start: int
    bias: str
    output: Linear
    shape: tuple[int, int]


def find_value_heads(model: OnnxModel, linears: list[Linear]) -> list[ValueHeads]:
    """Return the attentions whose values can be rotated head by head."""
    graph = model.proto.graph
    made = {name: node for node in graph.node for name in node.output if name}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    layer_of = {linear.output: linear for linear in linears}
    found = []
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        sizes = {one.name: one.i for one in node.attribute}
        heads, kv_heads = sizes["num_heads"], sizes["kv_num_heads"]
        name, start, bias = (node.input[2] or node.input[0]), 0, ""
        if name in made and made[name].op_type == "Split":
            split = made[name]
            lengths = model.initializers.get(split.input[1]) if len(split.input) > 1 else None
            if lengths is None:
                continue
            start = int(sum(model.read(lengths)[: list(split.output).index(name)]))
            name = split.input[0]
        if name in made and made[name].op_type == "Add":
            bias = next((one for one in made[name].input if one in model.initializers), "")
            name = next(one for one in made[name].input if one != bias)
        value, after = layer_of.get(name), readers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type == "Slice":  # the last layer's, to the positions that get logits
            after = readers.get(after[0].output[0], [])
        output = layer_of.get(after[0].output[0]) if len(after) == 1 else None
        if value is None or output is None or len(readers[name]) > 1 or value.bias:
            continue
        head_size = output.shape[1] // heads
        if not node.input[2]:  # queries, keys and values are packed in this order
            start = (heads + kv_heads) * head_size
        if all(len(readers[one.weight]) == 1 for one in (value, output)):
            found.append(ValueHeads(value, start, bias, output, (kv_heads, head_size)))
    return found


def rotate_values(edits: Edits, heads: ValueHeads, rotation: np.ndarray) -> None:
    """Rotate the values of every head by `rotation`, float32 [head size, head size]."""
    kv_heads, head_size = heads.shape
    rows = slice(heads.start, heads.start + kv_heads * head_size)

    def turn_rows(weight: np.ndarray) -> np.ndarray:
        weight = weight.copy()
        by_head = weight[rows].reshape(kv_heads, head_size, -1)
        weight[rows] = (rotation.T @ by_head).reshape(kv_heads * head_size, -1)
        return weight

    def turn_columns(weight: np.ndarray) -> np.ndarray:
        return np.asarray((weight.reshape(len(weight), -1, head_size) @ rotation).reshape(weight.shape))

    edits.add(heads.value.weight, turn_rows)
    edits.add(heads.output.weight, turn_columns)
    if heads.bias:
        edits.add(heads.bias, lambda bias: turn_rows(bias[:, None])[:, 0])


def random_rotation(size: int, seed: int) -> np.ndarray:
    """Return an orthogonal matrix that spreads every channel over all of them, float32 [size, size].

    A Hadamard matrix of the largest power of two in `size`, times (Kronecker) a random orthogonal matrix of the
    rest, with random signs.
    """
    rng = np.random.default_rng(seed)
    power = size & -size
    factor, triangle = np.linalg.qr(rng.standard_normal((size // power, size // power)))
    factor *= np.sign(np.diagonal(triangle))
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.kron(hadamard, np.array([[1, 1], [1, -1]]) / np.sqrt(2))
    return np.asarray(np.kron(hadamard, factor) * rng.choice([-1.0, 1.0], size)[:, None], np.float32)
