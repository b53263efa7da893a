"""Finding the linear layers and embeddings of a graph, whoever exported it."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto

from llmfast.graph.model import OnnxModel, reads
from llmfast.graph.view import attribute

# Smaller tables (token types, positions of a small encoder) save nothing worth an operator.
MIN_EMBEDDING_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Linear:
    """A node that multiplies by a constant matrix.

    Attributes:
        name: the layer's name, e.g. `model.layers.0.mlp.down_proj`.
        node: MatMul, Gemm or FusedMatMul.
        weight: the initializer that holds the matrix.
        stored_transposed: the initializer is `[N, K]`, not `[K, N]`.
        bias: the value added by the node itself (Gemm), or empty.
        shape: `(N, K)` = (out_features, in_features).
    """

    name: str
    node: onnx.NodeProto
    weight: str
    stored_transposed: bool
    bias: str
    shape: tuple[int, int]

    @property
    def role(self) -> str:
        """What layers of one kind share; see `role_of`."""
        return role_of(self.name)

    @property
    def input(self) -> str:
        """Name of the activations the layer multiplies."""
        return str(self.node.input[0])

    @property
    def is_turned(self) -> bool:
        """Whether a Transpose lies between the initializer and the node."""
        matched = _match(self.node)
        return matched is not None and matched[0] != self.stored_transposed

    @property
    def output(self) -> str:
        """Name of the layer's result."""
        return str(self.node.output[0])

    def read(self, model: OnnxModel) -> np.ndarray:
        """Return the weight as float32 `[N, K]`."""
        array = model.read(model.initializers[self.weight]).astype(np.float32, copy=False)
        return array if self.stored_transposed else array.T

    def as_stored(self, weight: np.ndarray) -> np.ndarray:
        """Return a weight `[N, K]` the way round that the initializer holds it."""
        return weight if self.stored_transposed else weight.T


@dataclass(frozen=True)
class Embedding:
    """A Gather of rows of a constant table.

    Attributes:
        node: the Gather.
        weight: the initializer that holds the table.
        stored_transposed: the initializer is `[hidden, vocab]`, as a head multiplies by it.
        shape: `(vocab, hidden)`.
    """

    node: onnx.NodeProto
    weight: str
    stored_transposed: bool
    shape: tuple[int, int]

    def read(self, model: OnnxModel) -> np.ndarray:
        """Return the table as float32 `[vocab, hidden]`."""
        array = model.read(model.initializers[self.weight])
        return array.T if self.stored_transposed else array

    def as_stored(self, table: np.ndarray) -> np.ndarray:
        """Return a table `[vocab, hidden]` the way round that the initializer holds it."""
        return table.T if self.stored_transposed else table


def find_linears(model: OnnxModel) -> list[Linear]:
    """Return the linear layers of the top-level graph, in the graph's order."""
    resolve = _resolver(model)
    found = []
    for node in model.proto.graph.node:
        matched = _match(node)
        if matched is None:
            continue
        transposed, bias = matched
        weight, folded = resolve(node.input[1])
        if weight is None or (bias and not _is_vector(model.initializers.get(bias))):
            continue
        stored_transposed = transposed != folded
        rows, columns = weight.dims
        shape = (rows, columns) if stored_transposed else (columns, rows)
        found.append(Linear(_layer_name(node, weight.name), node, weight.name, stored_transposed, bias, shape))
    return found


def with_bias(model: OnnxModel, linear: Linear, adds: dict[str, onnx.NodeProto]) -> Linear:
    """Return the layer that also does the Add of a constant vector to its result; the same layer where there is none.

    Args:
        adds: what `lone_adds` found in the model.
    """
    add = adds.get(linear.output)
    if linear.bias or add is None:
        return linear
    vector = next(name for name in (*add.input, "") if name != linear.output)
    bias = model.initializers.get(vector)
    if bias is None or list(bias.dims) != [linear.shape[0]]:
        return linear
    node = onnx.NodeProto()
    node.CopyFrom(linear.node)
    node.output[0] = add.output[0]
    return replace(linear, node=node, bias=vector)


def lone_adds(model: OnnxModel) -> dict[str, onnx.NodeProto]:
    """Return the Add that reads a value, by the value, where nothing else does."""
    graph = model.proto.graph
    uses = Counter(name for node in graph.node for name in reads(node)) + Counter(one.name for one in graph.output)
    return {name: node for node in graph.node if node.op_type == "Add" for name in node.input if uses[name] == 1}


def find_embeddings(
    model: OnnxModel, linears: list[Linear], min_elements: int = MIN_EMBEDDING_ELEMENTS
) -> list[Embedding]:
    """Return the embedding tables of the top-level graph that are large, or that one of `linears` multiplies by."""
    resolve = _resolver(model)
    tied = {linear.weight for linear in linears}
    found = []
    for node in model.proto.graph.node:
        if node.op_type != "Gather" or attribute(node, "axis", 0) != 0 or node.input[1] in model.initializers:
            continue
        table, transposed = resolve(node.input[0])
        if table is not None and (table.name in tied or math.prod(table.dims) >= min_elements):
            rows, columns = table.dims
            shape = (columns, rows) if transposed else (rows, columns)
            found.append(Embedding(node, table.name, transposed, shape))
    return found


def role_of(name: str) -> str:
    """Return the last part of a layer's name, with the one before it where it is a number in a container."""
    *_, container, last = ("", *name.split("."))
    return f"{container}.{last}" if last.isdigit() and container else last


def _match(node: onnx.NodeProto) -> tuple[bool, str] | None:
    """Return whether the node transposes its weight, and its bias; None when it is no linear layer."""
    if node.op_type == "MatMul" and not node.domain:
        return False, ""
    if node.op_type == "Gemm":
        plain = not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == 1.0
        plain &= attribute(node, "beta", 1.0) == 1.0
        bias = node.input[2] if len(node.input) > 2 else ""
        return (bool(attribute(node, "transB", 0)), bias) if plain else None
    if node.op_type == "FusedMatMul":
        plain = attribute(node, "alpha", 1.0) == 1.0
        plain &= not any(attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
        return (bool(attribute(node, "transB", 0)), "") if plain else None
    return None


def _resolver(model: OnnxModel) -> Callable[[str], tuple[TensorProto | None, bool]]:
    """Return a function that follows a value to its initializer through Transpose and Identity."""
    initializers = model.initializers
    producers = {output: node for node in model.proto.graph.node for output in node.output}

    def resolve(name: str) -> tuple[TensorProto | None, bool]:
        transposed = False
        while name not in initializers:
            node = producers.get(name)
            if node is None or node.op_type not in ("Transpose", "Identity"):
                return None, False
            transposed ^= node.op_type == "Transpose"
            name = node.input[0]
        return (initializers[name], transposed) if _is_matrix(initializers[name]) else (None, False)

    return resolve


def _layer_name(node: onnx.NodeProto, weight: str) -> str:
    """Prefer the weight's name; exporters that number their weights leave the node's."""
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight").removesuffix(".MatMul")
    name: str = node.name or node.output[0]
    return name.strip("/").replace("/", ".").removesuffix(".MatMul").removesuffix(".Gemm")


def _is_matrix(tensor: TensorProto) -> bool:
    return len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT


def _is_vector(tensor: TensorProto | None) -> bool:
    return tensor is not None and len(tensor.dims) == 1
