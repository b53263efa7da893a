"""The bytes of a bundle, layer by layer."""

from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.errors import LlmfastError
from llmfast.graph.census import take_census
from llmfast.graph.model import OnnxModel, tensor_bytes
from llmfast.graph.view import GraphView


def describe_layers(bundle: ModelBundle) -> list[dict[str, Any]]:
    """Return `graph`, `name`, `role`, `weights` (number format), `num_parameters` and `bytes` of every layer.

    A weight that graphs or layers share counts with the first. A bundle whose graph can't be read has none.
    """
    seen: set[tuple[str, ...]] = set()
    rows = []
    for role, path in bundle.graphs.items():
        try:
            model = OnnxModel.load(path, any_opset=True)
        except LlmfastError:
            return []
        for layer in take_census(GraphView(model)):
            size = 0
            for name in layer.tensors:
                tensor = model.initializers[name]
                place = tuple(f"{entry.key}={entry.value}" for entry in tensor.external_data) or (role, name)
                size += 0 if place in seen else tensor_bytes(tensor)
                seen.add(place)
            facts = {"graph": role, "name": layer.name, "role": layer.role, "weights": layer.weights}
            rows.append(facts | {"num_parameters": int(layer.num_parameters), "bytes": int(size)})
    return rows
