"""`llmfast quantize`: a float bundle or .onnx file becomes a smaller one."""

import importlib.metadata
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import llmfast
from llmfast import registry
from llmfast.bundle import (
    COMPANIONS,
    MANIFEST,
    Manifest,
    ModelBundle,
    Step,
    check_output,
    sha256,
    stage_output,
    write_manifest,
)
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.graph.linear import Linear
from llmfast.graph.model import OnnxModel, count_parameters, count_weight_bytes
from llmfast.graph.packed import Grid, QuantizedWeight
from llmfast.graph.weights import WeightFile
from llmfast.quantize.calibrate import Calibration, calibration_samples
from llmfast.quantize.plan import DEFAULT_ROUNDING, Layers, Plan, choose_layers, list_layers
from llmfast.quantize.rewrite import LayerReport, QuantizedGraph, RoundWeight
from llmfast.quantize.workpiece import InputStatistics, Workpiece
from llmfast.report import Column, progress
from llmfast.runtime import open_session

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
        method: how the numbers are found: files in quantize/transforms, then one in quantize/rounding,
            separated by commas.
        settings: options of scheme and methods as typed, `KEY -> VALUE`.
        include: quantize only layers whose name matches this regular expression.
        exclude: keep layers whose name matches.
        calibration: the text that methods with statistics run on.
        overwrite: replace an existing bundle.
    """

    scheme: str
    method: str = DEFAULT_ROUNDING
    settings: Mapping[str, str] = field(default_factory=dict)
    include: str = ""
    exclude: str = ""
    calibration: Calibration | None = None
    overwrite: bool = False


def quantize(source: Path, output: Path, options: QuantizeOptions) -> ModelBundle:
    """Quantize a model.

    Args:
        source: a bundle, a directory that holds model.onnx, or a lone .onnx file.
        output: the new bundle's directory.
        options: see `QuantizeOptions`.

    Returns:
        The new bundle; its manifest says what was done to the layers of each role.

    Raises:
        OptionError: an unknown scheme, method or setting, or a method without the text it needs.
        InputError: the model is missing, truncated or has NaN weights; too little calibration text.
        UnsupportedError: nothing to quantize, or already quantized.
        OutputExistsError: the output exists.
    """
    plan, bundle, graphs = _prepare(source, output, options)
    with stage_output(output, options.overwrite) as staged:
        weights = WeightFile(staged)
        quantized = {
            role: _quantize_graph(plan, bundle, model, layers, weights, options.calibration)
            for role, (model, layers) in graphs.items()
        }
        if len(quantized) == 1:
            weights.save(next(iter(quantized.values()))[0])
        else:
            weights.save_all({role: proto for role, (proto, _) in quantized.items()})
        for name in COMPANIONS:
            if companion := bundle.companion(name):
                shutil.copyfile(companion, staged / name)
        before = [model for model, _ in graphs.values()]
        after = {role: OnnxModel.load(staged / f"{role}.onnx") for role in quantized}
        for model in after.values():
            _check_loads(model.path, source)
        reports: list[LayerReport] = []
        for _, part in quantized.values():
            known = {report.name for report in reports}  # what graphs share was quantized alike
            reports += [report for report in part if report.name not in known]
        write_manifest(staged, _manifest(bundle, before, after, plan, options, reports))
    return ModelBundle.open(output)


def _quantize_graph(
    plan: Plan,
    bundle: ModelBundle,
    model: OnnxModel,
    layers: Layers,
    weights: WeightFile,
    calibration: Calibration | None,
) -> tuple[onnx.ModelProto, list[LayerReport]]:
    workpiece = _transform(plan, bundle, model, layers, calibration)
    write_linear = plan.scheme.plugin.make_writer(workpiece, plan.scheme.options)
    round_weight = _rounding(plan, workpiece)
    graph = QuantizedGraph(model, layers, workpiece.edits, weights, write_linear, round_weight)
    with progress(f"quantizing {model.path.name}", layers.num_nodes) as advance:
        proto = graph.write(advance)
    return proto, graph.reports


def _check_loads(model: Path, source: Path) -> None:
    """Refuse to write a model that ONNX Runtime can't open."""
    try:
        open_session(model)
    except InputError as error:
        raise UnsupportedError(f"`{source}`: the quantized graph does not load: {error.message}") from error


def plan_layers(source: Path, output: Path, options: QuantizeOptions) -> list[dict[str, Any]]:
    """Check everything `quantize` checks before it works, and return one row per role of what it would do."""
    return list_layers([layers for _, layers in _prepare(source, output, options)[2].values()])


def _prepare(
    source: Path, output: Path, options: QuantizeOptions
) -> tuple[Plan, ModelBundle, dict[str, tuple[OnnxModel, Layers]]]:
    plan = Plan.make(options.scheme, options.method, options.settings)
    if plan.needs_calibration and options.calibration is None:
        raise OptionError(f"{' and '.join(plan.needs_calibration)} need --calibration", "give a UTF-8 text file")
    bundle = ModelBundle.open(source)
    inputs = (source, source.parent) if (source.parent / MANIFEST).is_file() else (source,)
    check_output(output, inputs, options.overwrite)
    models = {role: OnnxModel.load(path) for role, path in bundle.graphs.items()}
    chosen = {role: choose_layers(model, plan, options.include, options.exclude) for role, model in models.items()}
    return plan, bundle, {role: (models[role], layers) for role, layers in chosen.items()}


def _transform(
    plan: Plan, bundle: ModelBundle, model: OnnxModel, layers: Layers, calibration: Calibration | None
) -> Workpiece:
    """Run the transforms and return what they made."""
    samples = calibration_samples(bundle, calibration) if calibration and plan.needs_calibration else []
    workpiece = Workpiece(model, layers, samples)
    for transform in plan.transforms:
        transform.plugin.transform(workpiece, transform.options)
    return workpiece


def _rounding(plan: Plan, workpiece: Workpiece) -> RoundWeight:
    """Return the function that rounds a weight; embeddings and heads are rounded to nearest."""
    nearest = registry.load("quantize.rounding", DEFAULT_ROUNDING)
    method = plan.rounding
    statistics_of = InputStatistics(workpiece, method.options.sequential) if method.plugin.NEEDS_STATISTICS else None

    def round_weight(weight: np.ndarray, grid: Grid, linear: Linear | None) -> QuantizedWeight:
        quantized: QuantizedWeight
        if linear is None:
            quantized = nearest.quantize_weight(weight, grid, nearest.Options())
        elif statistics_of is None:
            quantized = method.plugin.quantize_weight(weight, grid, method.options)
        else:
            quantized = method.plugin.quantize_weight(weight, grid, method.options, statistics_of(linear), linear.name)
            statistics_of.quantized(linear, quantized)
        return quantized

    return round_weight


def _manifest(
    bundle: ModelBundle,
    before: list[OnnxModel],
    after: dict[str, OnnxModel],
    plan: Plan,
    options: QuantizeOptions,
    reports: list[LayerReport],
) -> Manifest:
    source = bundle.manifest.source or {"id": bundle.model.name, "revision": None, "sha256": sha256(bundle.model)}
    parameters = bundle.manifest.architecture.get("num_parameters") or count_parameters(before)
    step = Step(
        stage="quantize",
        method=f"{plan.scheme.name}:{plan.method}",
        options={"include": options.include, "exclude": options.exclude, **plan.options},
        versions={name: importlib.metadata.version(name) for name in ("numpy", "onnx")}
        | {"llmfast": llmfast.__version__},
        calibration=options.calibration.describe() if options.calibration and plan.needs_calibration else None,
    )
    return replace(
        bundle.manifest,
        source=source,
        architecture={**bundle.manifest.architecture, "num_parameters": parameters},
        graphs={
            role: {
                "file": model.path.name,
                "inputs": [value.name for value in model.proto.graph.input],
                "outputs": [value.name for value in model.proto.graph.output],
            }
            for role, model in after.items()
        },
        bits_per_weight=8 * count_weight_bytes(after.values()) / parameters,
        lineage=(*bundle.manifest.lineage, step),
        measured={**bundle.manifest.measured, "quantize": {"layers": _summarize(reports)}},
    )


def _summarize(reports: list[LayerReport]) -> list[dict[str, Any]]:
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
