"""`llmfast inspect`: the facts of a model, read from its graph and manifest; weights stay on disk."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from llmfast.bundle import ModelBundle
from llmfast.graph.census import Layer, dtype_name, take_census
from llmfast.graph.lint import Finding, lint
from llmfast.graph.model import OnnxModel, count_weight_bytes, tensor_bytes
from llmfast.graph.view import GraphView
from llmfast.inspect.result import CacheFacts, File, GraphFacts, Inspection, LayerGroup, SlowForm, Stored, Value

_TENSOR_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


def inspect(path: Path) -> Inspection:
    """Describe a model.

    Args:
        path: a bundle, a directory that holds model.onnx, or a lone .onnx file, whoever made it.

    Raises:
        InputError: not a model, truncated, or a data file is missing.
        UnsafeInputError: weights outside the model's folder.
    """
    bundle = ModelBundle.open(path)
    manifest = bundle.manifest
    models = {role: OnnxModel.load(file, any_opset=True) for role, file in bundle.graphs.items()}
    context = manifest.architecture.get("context_length")
    graphs = [_describe_graph(role, model, context) for role, model in models.items()]
    parameters = manifest.architecture.get("num_parameters") or sum(
        layer.num_parameters for graph in graphs for layer in graph.layers
    )
    weight_bytes = count_weight_bytes(models.values())
    return Inspection(
        bundle.name,
        manifest.task,
        dict(manifest.source),
        dict(manifest.architecture),
        parameters,
        weight_bytes,
        8 * weight_bytes / parameters if parameters else None,
        bundle.size_bytes,
        _files(bundle, models.values()),
        list(manifest.lineage),
        graphs,
    )


def _describe_graph(role: str, model: OnnxModel, context: int | None) -> GraphFacts:
    view = GraphView(model)
    graph = model.proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    return GraphFacts(
        role,
        model.path.name,
        model.opset,
        f"{model.proto.producer_name} {model.proto.producer_version}".strip(),
        [_describe_value(value) for value in graph.input if value.name not in constants],
        [_describe_value(value) for value in graph.output],
        _count_operators(view),
        _by_dtype(model),
        _by_role(take_census(view), model),
        _describe_cache(graph, context),
        [_describe_finding(found) for found in lint(model)],
    )


def _describe_value(value: onnx.ValueInfoProto) -> Value:
    kind = value.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else size.dim_param or "?" for size in kind.shape.dim]
    return Value(value.name, dtype_name(kind.elem_type), shape)


def _count_operators(view: GraphView) -> dict[str, int]:
    """Count the nodes by operator, most first; those outside of ONNX's own set carry their domain."""
    counted = Counter(
        f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type for node in view.nodes
    )
    return dict(sorted(counted.items(), key=lambda entry: (-entry[1], entry[0])))


def _by_dtype(model: OnnxModel) -> list[Stored]:
    sizes: dict[str, list[int]] = {}
    for tensor in model.proto.graph.initializer:
        sizes.setdefault(dtype_name(tensor.data_type), []).append(tensor_bytes(tensor))
    rows = [Stored(dtype, len(parts), sum(parts)) for dtype, parts in sizes.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def _by_role(layers: Sequence[Layer], model: OnnxModel) -> list[LayerGroup]:
    """Return one row per role and number format, in the graph's order."""
    taken: set[str] = set()
    rows: dict[tuple[Any, ...], LayerGroup] = {}
    for layer in layers:
        form = layer.role, layer.weights, layer.bits, layer.block_size, layer.symmetric, layer.activations
        row = rows.setdefault(form, LayerGroup(*form))
        row.layers += 1
        row.num_parameters += layer.num_parameters
        row.bytes += sum(tensor_bytes(model.initializers[name]) for name in layer.tensors if name not in taken)
        taken.update(layer.tensors)
    return list(rows.values())


def _describe_cache(graph: onnx.GraphProto, context: int | None) -> CacheFacts | None:
    """Return the bytes of keys and values that one token of one sequence takes, and a full context."""
    past = [_describe_value(value) for value in graph.input if value.name.startswith("past")]
    past = [value for value in past if len(value.shape) == 4]
    if not past:
        return None
    per_token = sum(
        math.prod(size for size in value.shape[1:] if isinstance(size, int)) * _TENSOR_BYTES.get(value.dtype, 4)
        for value in past
    )
    return CacheFacts(len(past), per_token, context, per_token * context if context else None)


def _describe_finding(found: Finding) -> SlowForm:
    rule = found.rule
    return SlowForm(rule.name, rule.affects, len(found.nodes), found.nodes[0], rule.reason, rule.remedy)


def _files(bundle: ModelBundle, models: Iterable[OnnxModel]) -> list[File]:
    """List a bundle's files as its manifest has them, or a lone graph and the data files that it names."""
    listed: Mapping[str, Mapping[str, Any]] = bundle.manifest.files
    if listed:
        return [File(name, entry["bytes"]) for name, entry in listed.items()]
    names = {bundle.model.name, *(name for model in models for name in model.data_files)}
    return [File(name, (bundle.path / name).stat().st_size) for name in sorted(names)]
