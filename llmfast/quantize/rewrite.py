"""Writing the quantized graph: linear layers and embeddings replaced, everything else kept."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx

from llmfast.errors import GateError, InputError
from llmfast.graph.builder import GraphBuilder
from llmfast.graph.edits import Edits
from llmfast.graph.floats import FloatFormat, FloatWeight, write_float_rows
from llmfast.graph.linear import Embedding, Linear, lone_adds, with_bias
from llmfast.graph.model import OnnxModel, live_nodes, reads
from llmfast.graph.packed import Grid, QuantizedWeight, WriteLinear, store_blocks, write_gather, write_matmul_nbits
from llmfast.graph.weights import WeightFile
from llmfast.quantize.plan import EMBEDDING_ROLE, FLOAT_BITS, HEAD_ROLE, Layers
from llmfast.report import note

Weight = QuantizedWeight | FloatWeight


class RoundWeight(Protocol):
    """How a weight is rounded."""

    def __call__(self, weight: np.ndarray, grid: Grid | FloatFormat, linear: Linear | None) -> Weight:
        """Quantize float32 [N, K]; `linear` is None for an embedding and a head in blocks."""


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one weight.

    Attributes:
        block_size: input features that share a scale.
        squared_error: sum of (w - w')^2.
        power: sum of w^2.
        output_error: sum of (x w^T - x w'^T)^2 over some activations; None when there are none.
        output_power: sum of (x w^T)^2.
    """

    name: str
    role: str
    bits: int
    num_parameters: int
    squared_error: float
    power: float
    block_size: int
    output_error: float | None = None
    output_power: float | None = None


class QuantizedGraph:
    """Rewrites a graph layer by layer into a weight file.

    Args:
        model: the float graph.
        layers: which weights, and their grids.
        edits: what the transforms decided.
        weights: where the new weights go.
        write_linear: what the scheme's `make_writer` returned.
        round_weight: the method's.
        inputs_of: gives some rows of a layer's input, asked for in the graph's order, for the error of its output.
    """

    def __init__(
        self,
        model: OnnxModel,
        layers: Layers,
        edits: Edits,
        weights: WeightFile,
        write_linear: WriteLinear,
        round_weight: RoundWeight,
        inputs_of: Callable[[Linear], np.ndarray | None] | None = None,
    ) -> None:
        self._model = model
        self._layers = layers
        self._edits = edits
        self._weights = weights
        self._write_linear = write_linear
        self._round_weight = round_weight
        self._inputs_of = inputs_of
        self._tables = {table.weight for table in layers.embeddings}
        self._uses = Counter(linear.weight for linear in layers.linears)
        self._uses.update(table.weight for table in layers.embeddings)
        self._rounded: dict[str, Weight] = {}
        self._blocks: dict[str, list[str]] = {}
        self.reports: list[LayerReport] = []

    @property
    def num_nodes(self) -> int:
        """How many nodes will be replaced."""
        return self._layers.num_nodes

    def write(self, advance: Callable[[], None]) -> onnx.ModelProto:
        """Write the weights, and return the graph that goes with them."""
        graph = GraphBuilder(self._weights, self._model.opset)
        grids = self._layers.grids
        linear_of = {linear.output: linear for linear in self._quantized_linears()}
        embedding_of = {table.node.output[0]: table for table in self._layers.embeddings if table.weight in grids}
        inputs_of = {output: [linear.input] for output, linear in linear_of.items()}
        inputs_of |= {output: [table.node.input[1]] for output, table in embedding_of.items()}
        # Nodes that only prepared a replaced weight, such as a Transpose before a MatMul, are not needed.
        for node in live_nodes(self._model.proto.graph, lambda node: inputs_of.get(node.output[0]) or reads(node)):
            output = node.output[0]
            if output in linear_of:
                self._replace_linear(graph, linear_of[output])
                advance()
            elif output in embedding_of:
                self._replace_embedding(graph, embedding_of[output])
                advance()
            else:
                self._keep(graph, [name for name in reads(node) if name in self._model.initializers])
                graph.keep(node)
        self._keep(graph, [one.bias for one in linear_of.values() if one.bias in self._model.initializers])
        kept = [one.name for one in self.reports if one.bits == FLOAT_BITS]
        if kept:
            note(f"note: kept in float32, for the scheme's format does not hold their values: {', '.join(kept)}")
        return graph.rewrite(self._model)

    def _quantized_linears(self) -> Iterator[Linear]:
        """Yield the layers to replace; a kernel of integers adds the bias as it scales its sums.

        Layers that share a weight have one name, under which it is stored once.
        """
        adds = lone_adds(self._model)
        names: dict[str, str] = {}
        for layer in self._layers.linears:
            grid = self._layers.grids.get(layer.weight)
            if grid is not None:
                linear = replace(layer, name=names.setdefault(layer.weight, layer.name))
                yield linear if isinstance(grid, FloatFormat) else with_bias(self._model, linear, adds)

    def _keep(self, graph: GraphBuilder, names: list[str]) -> None:
        for name in names:
            array = self._edits.read_stored(name)
            _refuse_nan(self._model, name, array)
            graph.weight(name, array)

    def _replace_linear(self, graph: GraphBuilder, linear: Linear) -> None:
        def read() -> np.ndarray:
            return self._edits.read(linear)

        if linear.weight in self._layers.block_wise:
            weight, stored = self._store(graph, linear.weight, linear.name, HEAD_ROLE, read)
            write_matmul_nbits(graph, stored, weight, linear.input, linear.output, linear.bias)
        elif linear.weight in self._tables:
            self._write_linear(graph, linear, self._quantize_once(linear.weight, linear.name, HEAD_ROLE, read))
        else:
            rounded = self._quantize_once(linear.weight, linear.name, linear.role, read, linear)
            self._write_linear(graph, linear, rounded)

    def _replace_embedding(self, graph: GraphBuilder, table: Embedding) -> None:
        name = table.weight.removesuffix(".weight")

        def read() -> np.ndarray:
            stored = self._edits.read_stored(table.weight)
            return stored.T if table.stored_transposed else stored

        if isinstance(self._layers.grids[table.weight], FloatFormat):
            floats = self._quantize_once(table.weight, name, EMBEDDING_ROLE, read)
            assert isinstance(floats, FloatWeight)
            write_float_rows(graph, table, floats)
        else:
            weight, stored = self._store(graph, table.weight, name, EMBEDDING_ROLE, read)
            indices = table.node.input[1]
            write_gather(graph, stored, weight, indices, table.node.output[0], self._model.rank(indices))

    def _quantize_once(
        self, weight: str, name: str, role: str, read: Callable[[], np.ndarray], linear: Linear | None = None
    ) -> Weight:
        """Quantize a weight once for all nodes that read it, and hold it until the last of them is replaced."""
        if weight not in self._rounded:
            self._rounded[weight] = self._quantize(weight, name, role, read(), linear)
        self._uses[weight] -= 1
        return self._rounded[weight] if self._uses[weight] else self._rounded.pop(weight)

    def _store(
        self, graph: GraphBuilder, weight: str, name: str, role: str, read: Callable[[], np.ndarray]
    ) -> tuple[QuantizedWeight, list[str]]:
        """Quantize and store a block-wise weight once."""
        quantized = self._quantize_once(weight, name, role, read)
        assert isinstance(quantized, QuantizedWeight)
        if weight not in self._blocks:
            self._blocks[weight] = store_blocks(graph, name, quantized)
        return quantized, self._blocks[weight]

    def _quantize(self, weight: str, name: str, role: str, array: np.ndarray, linear: Linear | None) -> Weight:
        array = np.asarray(array, np.float32)
        _refuse_damaged(self._model, weight, array)
        quantized = self._round_weight(array, self._layers.grids[weight], linear)
        moved = quantized.dequantize() - array
        if not np.isfinite(moved).all():
            raise GateError(f"layer `{name}` would get values that are NaN or infinite", "choose another --method")
        self.reports.append(
            LayerReport(
                name,
                role,
                quantized.grid.bits,
                array.size,
                _power(moved),
                _power(array),
                quantized.grid.block_size,
                *self._output_errors(array, moved, linear),
            )
        )
        return quantized

    def _output_errors(
        self, weight: np.ndarray, moved: np.ndarray, linear: Linear | None
    ) -> tuple[float | None, float | None]:
        rows = self._inputs_of(linear) if self._inputs_of is not None and linear is not None else None
        if rows is None:
            return None, None
        return _power(rows @ moved.T), _power(rows @ weight.T)


def refuse_damaged_layers(model: OnnxModel, layers: Layers) -> None:
    """Raise an InputError that names the first layer or vector of a float graph that has NaN or infinite values."""
    for linear in layers.linears:
        _refuse_damaged(model, linear.weight, linear.read(model))
    for name, tensor in model.initializers.items():
        if len(tensor.dims) == 1:
            _refuse_nan(model, name, model.read(tensor))


def _refuse_damaged(model: OnnxModel, weight: str, array: np.ndarray) -> None:
    _refuse(model, weight, ~np.isfinite(array), "NaN or infinite")


def _refuse_nan(model: OnnxModel, name: str, array: np.ndarray) -> None:
    """Refuse what is no layer's weight, of which a mask may be infinite."""
    if array.dtype.kind == "f":
        _refuse(model, name, np.isnan(array), "NaN")


def _refuse(model: OnnxModel, name: str, is_bad: np.ndarray, what: str) -> None:
    if is_bad.any():
        places = np.argwhere(is_bad)
        raise InputError(
            f"weight `{name}` of `{model.path}` has {len(places)} values that are {what}, "
            f"the first at {places[0].tolist()}",
            "the checkpoint is damaged or its training diverged",
        )


def _power(array: np.ndarray) -> float:
    return float(np.square(array).sum(dtype=np.float64))
