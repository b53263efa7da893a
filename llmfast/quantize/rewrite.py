"""Writing the quantized graph: linear layers and embeddings replaced, everything else kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from llmfast.errors import InputError
from llmfast.graph.builder import GraphBuilder
from llmfast.graph.linear import Embedding, Linear
from llmfast.graph.model import OnnxModel, walk
from llmfast.graph.packed import (
    Grid,
    QuantizedWeight,
    largest_block_size,
    store_blocks,
    write_gather,
    write_matmul_nbits,
)
from llmfast.graph.weights import WeightFile

HEAD_ROLE = "lm_head"
EMBEDDING_ROLE = "embedding"


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one weight.

    Attributes:
        squared_error: sum of (w - w')^2.
        power: sum of w^2.
    """

    name: str
    role: str
    bits: int
    num_parameters: int
    squared_error: float
    power: float


class QuantizedGraph:
    """Rewrites a graph layer by layer into a weight file.

    Args:
        model: the float graph.
        weights: where the new weights go.
        write_linear: the scheme's `write_linear`.
        round_weight: `(weight [N, K], grid) -> QuantizedWeight`.
        grids: the grid of each weight to quantize, by initializer name; others are kept.
        block_wise: weights that the scheme does not handle: embeddings, and the heads tied to them.
    """

    def __init__(
        self,
        model: OnnxModel,
        weights: WeightFile,
        write_linear: Callable[[GraphBuilder, Linear, QuantizedWeight], None],
        round_weight: Callable[[np.ndarray, Grid], QuantizedWeight],
        grids: Mapping[str, Grid],
        block_wise: frozenset[str],
    ) -> None:
        self._model = model
        self._weights = weights
        self._write_linear = write_linear
        self._round_weight = round_weight
        self._grids = grids
        self._block_wise = block_wise
        self._blocks: dict[str, tuple[QuantizedWeight, list[str]]] = {}
        self.reports: list[LayerReport] = []

    def write(self, linears: list[Linear], embeddings: list[Embedding], advance: Callable[[], None]) -> list[str]:
        """Write the graph; return the names of its files."""
        graph = GraphBuilder(self._weights, self._model.opset)
        linear_of = {linear.output: linear for linear in linears if linear.weight in self._grids}
        embedding_of = {table.node.output[0]: table for table in embeddings if table.weight in self._grids}
        replaced = {*linear_of, *embedding_of}
        for node in _live_nodes(self._model, replaced):
            output = node.output[0]
            if output in linear_of:
                self._replace_linear(graph, linear_of[output])
                advance()
            elif output in embedding_of:
                self._replace_embedding(graph, embedding_of[output])
                advance()
            else:
                for name in _constants(self._model, node):
                    graph.weight(name, self._model.read(self._model.initializers[name]))
                graph.keep(node)
        for linear in linear_of.values():
            if linear.bias in self._model.initializers:
                graph.weight(linear.bias, self._model.read(self._model.initializers[linear.bias]))
        return [file.name for file in self._weights.save(graph.rewrite(self._model))]

    def _replace_linear(self, graph: GraphBuilder, linear: Linear) -> None:
        if linear.weight in self._block_wise:
            weight, stored = self._store(graph, linear.weight, linear.name, HEAD_ROLE, lambda: linear.read(self._model))
            write_matmul_nbits(graph, stored, weight, linear.input, linear.output, linear.bias)
            return
        weight = self._quantize(linear.weight, linear.name, linear.role, linear.read(self._model))
        self._write_linear(graph, linear, weight)

    def _replace_embedding(self, graph: GraphBuilder, table: Embedding) -> None:
        name = table.weight.removesuffix(".weight")
        weight, stored = self._store(
            graph,
            table.weight,
            name,
            EMBEDDING_ROLE,
            lambda: self._model.read(self._model.initializers[table.weight]),
        )
        write_gather(graph, stored, weight, table.node.input[1], table.node.output[0])

    def _store(
        self, graph: GraphBuilder, weight: str, name: str, role: str, read: Callable[[], np.ndarray]
    ) -> tuple[QuantizedWeight, list[str]]:
        """Quantize and store a block-wise weight once, for the embedding and the head that share it."""
        if weight not in self._blocks:
            quantized = self._quantize(weight, name, role, read())
            self._blocks[weight] = quantized, store_blocks(graph, name, quantized)
        return self._blocks[weight]

    def _quantize(self, weight: str, name: str, role: str, array: np.ndarray) -> QuantizedWeight:
        array = np.asarray(array, np.float32)
        if not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))
            raise InputError(
                f"weight `{weight}` of `{self._model.path}` has {len(bad)} values that are NaN or infinite, "
                f"the first at {bad[0].tolist()}",
                "the checkpoint is damaged or its training diverged",
            )
        quantized = self._round_weight(array, self._grids[weight])
        error = float(np.square(quantized.dequantize() - array, dtype=np.float32).sum(dtype=np.float64))
        power = float(np.square(array).sum(dtype=np.float64))
        self.reports.append(LayerReport(name, role, quantized.grid.bits, array.size, error, power))
        return quantized


def block_wise_grid(in_features: int, bits: int) -> Grid:
    """Return the grid of an embedding or head: the largest blocks that fit, without zero points."""
    return Grid(bits=bits, block_size=largest_block_size(in_features))


def _constants(model: OnnxModel, node: onnx.NodeProto) -> list[str]:
    """Return the initializers that a node, or a node inside its subgraphs, reads."""
    inner = [name for attribute in node.attribute if attribute.HasField("g") for name in _inputs(attribute.g)]
    return [name for name in [*node.input, *inner] if name in model.initializers]


def _inputs(graph: onnx.GraphProto) -> list[str]:
    return [name for node in walk(graph) for name in node.input]


def _live_nodes(model: OnnxModel, replaced: set[str]) -> list[onnx.NodeProto]:
    """Drop nodes that only prepared weights that are no longer read, such as a Transpose before a MatMul."""
    needed = {output.name for output in model.proto.graph.output}
    live = []
    for node in reversed(model.proto.graph.node):
        if not needed.intersection(node.output):
            continue
        live.append(node)
        if node.output[0] in replaced:
            activations = 1 if node.op_type == "Gather" else 0
            needed.add(node.input[activations])
            needed.update(node.input[2:])
        else:
            needed.update(node.input)
            needed.update(
                name for attribute in node.attribute if attribute.HasField("g") for name in _inputs(attribute.g)
            )
    return live[::-1]
