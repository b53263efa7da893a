"""Rescaling activations without changing the function: factors folded into the neighbouring weights.

Where a norm, or the product of a gated MLP, feeds nothing but linear layers, its channel j can be
divided by any s[j] > 0 if column j of those layers is multiplied by it. The division costs nothing at
run time: it goes into the norm's weight, or into the rows of the linear layer that made one factor.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx

from llmfast.graph.edits import Edits
from llmfast.graph.linear import Linear
from llmfast.graph.model import OnnxModel, walk

# Operator -> inputs that hold one value per channel of its first output.
_NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}


@dataclass(frozen=True)
class FoldSite:
    """Activations `[tokens, K]` whose channels can be rescaled.

    Attributes:
        activations: the value's name.
        linears: the layers that multiply it; nothing else reads it.
        vectors: initializers `[K]` that are divided along with it (a norm's weight and bias).
        rows_of: the layer whose rows are divided instead (the linear factor of a product).
    """

    activations: str
    linears: tuple[Linear, ...]
    vectors: tuple[str, ...] = ()
    rows_of: Linear | None = None


def divide(edits: Edits, site: FoldSite, factors: np.ndarray) -> None:
    """Divide a site's activations by `factors`, float32 [K] > 0, and multiply the columns that meet them."""
    for linear in site.linears:
        edits.add(linear.weight, lambda weight: weight * factors)
    for vector in site.vectors:
        edits.add(vector, lambda values: values / factors)
    if site.rows_of is not None:
        edits.add(site.rows_of.weight, lambda weight: weight / factors[:, None])


def find_fold_sites(model: OnnxModel, linears: list[Linear]) -> list[FoldSite]:
    """Return the places where activations can be rescaled, in the graph's order.

    Args:
        model: the graph.
        linears: the layers that may be changed; a weight that something else reads too may not be.
    """
    graph = model.proto.graph
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in walk(graph):
        for name in node.input:
            readers[name].append(node)
    public = {output.name for output in graph.output}
    single = [linear for linear in linears if len(readers[linear.weight]) == 1]
    layer_of = {linear.output: linear for linear in single}
    sites = []
    for node in graph.node:
        name = node.output[0]
        consumers = [layer_of.get(reader.output[0]) for reader in readers[name]]
        if name in public or not consumers or any(layer is None or layer.input != name for layer in consumers):
            continue
        layers = tuple(layer for layer in consumers if layer is not None)
        if node.op_type in _NORMS:
            vectors = tuple(node.input[index] for index in _NORMS[node.op_type] if index < len(node.input))
            vectors = tuple(vector for vector in vectors if vector)
            shape = [layers[0].shape[1]]
            if all(len(readers[vector]) == 1 and _shape(model, vector) == shape for vector in vectors):
                sites.append(FoldSite(name, layers, vectors=vectors))
        elif node.op_type == "Mul":
            factor = next((layer_of[value] for value in reversed(node.input) if value in layer_of), None)
            if factor is not None and len(readers[factor.output]) == 1 and not factor.bias:
                sites.append(FoldSite(name, layers, rows_of=factor))
    return sites


def _shape(model: OnnxModel, name: str) -> list[int] | None:
    """Return the shape of a weight, None where a node makes the value or an input brings it."""
    tensor = model.initializers.get(name)
    return None if tensor is None else list(tensor.dims)
