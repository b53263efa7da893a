"""`llmfast quantize`: a float bundle or .onnx file becomes a smaller one."""

import importlib.metadata
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import llmfast
from llmfast import registry
from llmfast.bundle import (
    COMPANIONS,
    Manifest,
    ModelBundle,
    Step,
    check_output,
    sha256,
    stage_output,
    write_manifest,
)
from llmfast.errors import OptionError, UnsupportedError
from llmfast.graph.linear import Embedding, Linear, find_embeddings, find_linears
from llmfast.graph.model import OnnxModel
from llmfast.graph.packed import BLOCK_SIZES, Grid
from llmfast.graph.weights import WeightFile
from llmfast.quantize.rewrite import EMBEDDING_ROLE, HEAD_ROLE, LayerReport, QuantizedGraph, block_wise_grid
from llmfast.report import Column, progress
from llmfast.runtime import open_session

# A graph that has one of these was quantized before.
_QUANTIZED_OPS = frozenset(
    {"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"}
    | {"DequantizeLinear", "GatherBlockQuantized"}
)
_FLOAT_BITS = 32

LAYER_COLUMNS = (
    Column("role", "role", align_right=False),
    Column("layers", "layers"),
    Column("parameters", "num_parameters", "{:,}".format),
    Column("bits", "bits"),
    Column("relative error", "relative_error", "{:.4f}".format),
)


@dataclass(frozen=True)
class QuantizeOptions:
    """Choices of a quantization.

    Attributes:
        scheme: the number format, a file in quantize/schemes.
        method: how the numbers are found: a file in quantize/rounding.
        settings: options of scheme and method as typed, `KEY -> VALUE`.
        include: quantize only layers whose name matches this regular expression.
        exclude: keep layers whose name matches.
        overwrite: replace an existing bundle.
    """

    scheme: str
    method: str = "rtn"
    settings: Mapping[str, str] = field(default_factory=dict)
    include: str = ""
    exclude: str = ""
    overwrite: bool = False


@dataclass(frozen=True)
class _Plan:
    """A checked choice: plug-ins and their resolved options."""

    scheme: ModuleType
    scheme_options: Any
    method: ModuleType
    method_options: Any


def quantize(source: Path, output: Path, options: QuantizeOptions) -> ModelBundle:
    """Quantize a model.

    Args:
        source: a bundle, a directory that holds model.onnx, or a lone .onnx file.
        output: the new bundle's directory.
        options: see `QuantizeOptions`.

    Returns:
        The new bundle; its manifest says what was done to the layers of each role.

    Raises:
        OptionError: an unknown scheme, method or setting.
        InputError: the model is missing, truncated or has NaN weights.
        UnsupportedError: nothing to quantize, or already quantized.
        OutputExistsError: the output exists.
    """
    plan = _make_plan(options)
    bundle = ModelBundle.open(source)
    check_output(output, (source,), options.overwrite)
    model = OnnxModel.load(bundle.model)
    linears, embeddings = _choose(model, options)
    grids, block_wise = _assign_grids(linears, embeddings, plan)
    with stage_output(output, options.overwrite) as staged:
        graph = QuantizedGraph(
            model,
            WeightFile(staged),
            plan.scheme.write_linear,
            partial(plan.method.quantize_weight, options=plan.method_options),
            grids,
            block_wise,
        )
        steps = sum(linear.weight in grids for linear in linears) + sum(table.weight in grids for table in embeddings)
        with progress("quantizing", steps) as advance:
            files = graph.write(linears, embeddings, advance)
        for name in COMPANIONS:
            if companion := bundle.companion(name):
                shutil.copyfile(companion, staged / name)
        open_session(staged / files[0])  # a model that does not load is not written
        write_manifest(
            staged, _manifest(bundle, model, OnnxModel.load(staged / files[0]), plan, options, graph.reports)
        )
    return ModelBundle.open(output)


def plan_layers(source: Path, output: Path, options: QuantizeOptions) -> list[dict[str, Any]]:
    """Check everything `quantize` checks before it works, and return one row per role of what it would do."""
    plan = _make_plan(options)
    check_output(output, (source,), options.overwrite)
    model = OnnxModel.load(ModelBundle.open(source).model)
    linears, embeddings = _choose(model, options)
    grids, block_wise = _assign_grids(linears, embeddings, plan)
    parts = {table.weight: (EMBEDDING_ROLE, table.shape) for table in embeddings}
    parts |= {
        linear.weight: (HEAD_ROLE if linear.weight in block_wise else linear.role, linear.shape)
        for linear in linears
        if linear.weight not in parts
    }
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for weight, (role, (out_features, in_features)) in parts.items():
        bits = grids[weight].bits if weight in grids else _FLOAT_BITS
        row = rows.setdefault((role, bits), {"role": role, "layers": 0, "num_parameters": 0, "bits": bits})
        row["layers"] += 1
        row["num_parameters"] += out_features * in_features
    return list(rows.values())


def _make_plan(options: QuantizeOptions) -> _Plan:
    scheme = registry.load("quantize.schemes", options.scheme)
    method = registry.load("quantize.rounding", options.method)
    scheme_keys = {entry.name for entry in fields(scheme.Options)}
    method_keys = {entry.name for entry in fields(method.Options)}
    unknown = {key for key in options.settings if key.replace("-", "_") not in scheme_keys | method_keys}
    if unknown:
        raise OptionError(
            f"`{options.scheme}` and `{options.method}` have no option `{sorted(unknown)[0]}`",
            f"they have: {', '.join(sorted(scheme_keys | method_keys))}",
        )
    of_scheme = {key: value for key, value in options.settings.items() if key.replace("-", "_") in scheme_keys}
    of_method = {key: value for key, value in options.settings.items() if key.replace("-", "_") in method_keys}
    plan = _Plan(scheme, registry.make_options(scheme, of_scheme), method, registry.make_options(method, of_method))
    block_size = plan.scheme.grid(plan.scheme_options).block_size
    if block_size and block_size not in BLOCK_SIZES:
        raise OptionError(f"block_size {block_size}: ONNX Runtime has no kernel for it", f"choose from {BLOCK_SIZES}")
    if plan.scheme_options.head_bits not in (8, _FLOAT_BITS):
        raise OptionError(f"head_bits {plan.scheme_options.head_bits}: not 8 or {_FLOAT_BITS}")
    return plan


def _choose(model: OnnxModel, options: QuantizeOptions) -> tuple[list[Linear], list[Embedding]]:
    quantized = next((node.op_type for node in model.proto.graph.node if node.op_type in _QUANTIZED_OPS), None)
    if quantized:
        raise UnsupportedError(
            f"`{model.path}` is already quantized: it has {quantized} nodes", "start from the float model"
        )
    try:
        include, exclude = re.compile(options.include), re.compile(options.exclude or r"(?!)")
    except re.error as error:
        raise OptionError(f"not a regular expression: `{error.pattern!s}`: {error}") from error

    def chosen(name: str) -> bool:
        return bool(include.search(name)) and not exclude.search(name)

    found = find_linears(model)
    linears = [linear for linear in found if chosen(linear.name)]
    embeddings = [table for table in find_embeddings(model, found) if chosen(table.weight.removesuffix(".weight"))]
    if not linears and not embeddings:
        hint = "--include/--exclude leave none of its layers" if found else "it has no MatMul or Gemm weights"
        raise UnsupportedError(f"nothing to quantize in `{model.path}`", hint)
    return linears, embeddings


def _assign_grids(
    linears: list[Linear], embeddings: list[Embedding], plan: _Plan
) -> tuple[dict[str, Grid], frozenset[str]]:
    """Give each weight its grid, and name those that are block-wise: embeddings and heads."""
    tables = {table.weight: table.shape[1] for table in embeddings}
    heads = {
        linear.weight: linear.shape[1] for linear in linears if linear.role == HEAD_ROLE or linear.weight in tables
    }
    grids = {linear.weight: plan.scheme.grid(plan.scheme_options) for linear in linears}
    bits = plan.scheme_options.head_bits
    for weight, features in (tables | heads).items():
        if bits == _FLOAT_BITS:
            grids.pop(weight, None)
        else:
            grids[weight] = block_wise_grid(features, bits)
    return grids, frozenset(tables | heads)


def _manifest(
    bundle: ModelBundle,
    before: OnnxModel,
    after: OnnxModel,
    plan: _Plan,
    options: QuantizeOptions,
    reports: list[LayerReport],
) -> Manifest:
    source = bundle.manifest.source or {
        "id": bundle.model.name,
        "revision": None,
        "sha256": sha256(bundle.model),
    }
    parameters = bundle.manifest.architecture.get("num_parameters") or before.num_parameters
    step = Step(
        stage="quantize",
        method=f"{options.scheme}:{options.method}",
        options={
            "include": options.include,
            "exclude": options.exclude,
            options.scheme: asdict(plan.scheme_options),
            options.method: asdict(plan.method_options),
        },
        versions={name: importlib.metadata.version(name) for name in ("numpy", "onnx")}
        | {"llmfast": llmfast.__version__},
    )
    graph = after.proto.graph
    return replace(
        bundle.manifest,
        source=source,
        architecture={**bundle.manifest.architecture, "num_parameters": parameters},
        graphs={
            "model": {
                "file": after.path.name,
                "inputs": [value.name for value in graph.input],
                "outputs": [value.name for value in graph.output],
            }
        },
        bits_per_weight=8 * after.weight_bytes / parameters,
        lineage=(*bundle.manifest.lineage, step),
        measured={**bundle.manifest.measured, "quantize": {"layers": summarize(reports)}},
    )


def summarize(reports: list[LayerReport]) -> list[dict[str, Any]]:
    """Return one row per role: layers, parameters, bits, and the relative error of its weights.

    The error is sqrt(sum (w - w')^2 / sum w^2): 0 is exact.
    """
    roles: dict[tuple[str, int], list[LayerReport]] = {}
    for report in reports:
        roles.setdefault((report.role, report.bits), []).append(report)
    return [
        {
            "role": role,
            "layers": len(group),
            "num_parameters": sum(report.num_parameters for report in group),
            "bits": bits,
            "relative_error": math.sqrt(
                sum(report.squared_error for report in group) / max(sum(report.power for report in group), 1e-30)
            ),
        }
        for (role, bits), group in roles.items()
    ]
