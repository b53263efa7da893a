"""The bytes of a bundle, layer by layer, and what its layers cost."""

from typing import Any

from llmfast.bundle import ModelBundle, read_json
from llmfast.errors import InputError, LlmfastError
from llmfast.graph.census import take_census
from llmfast.graph.model import OnnxModel, tensor_bytes
from llmfast.graph.view import GraphView


def describe_layers(bundle: ModelBundle) -> list[dict[str, Any]]:
    """Return `graph`, `name`, `role`, `weights` (number format), `num_parameters` and `bytes` of every layer.

    A bundle whose graph can't be read has none. Where quantize measured what a layer costs, `damage` says so.
    A weight that graphs or layers share counts with the first.
    """
    seen: set[tuple[str, ...]] = set()
    damages = _read_damages(bundle)
    rows: list[dict[str, Any]] = []
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
            facts: dict[str, Any] = {"graph": role, "name": layer.name, "role": layer.role, "weights": layer.weights}
            if layer.name in damages:
                facts["damage"] = damages[layer.name]
            rows.append(facts | {"num_parameters": int(layer.num_parameters), "bytes": int(size)})
    return rows


def _read_damages(bundle: ModelBundle) -> dict[str, float]:
    """Return layer -> damage, as a budget of quantize leaves it in the bundle; none where there is no such file."""
    path = bundle.companion("sensitivity.json")
    ranking = read_json(path) if path is not None else {}
    try:
        return {str(entry["name"]): float(entry["damage"]) for entry in ranking.get("layers", ())}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"malformed ranking of layers: `{path}`", "remove it, or quantize again") from error
