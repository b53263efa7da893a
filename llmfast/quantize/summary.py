"""What a quantization did to the layers, as rows for people and for the manifest."""

import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import llmfast
from llmfast.bundle import PREFILL, Manifest, ModelBundle, Step, sha256
from llmfast.graph.lint import lint
from llmfast.graph.model import OnnxModel, count_weight_bytes
from llmfast.quantize.budget import num_parameters
from llmfast.quantize.options import QuantizeOptions, is_calibrated
from llmfast.quantize.plan import Part
from llmfast.quantize.rewrite import LayerReport
from llmfast.report import Column

LAYER_COLUMNS = (
    Column("role", "role", align_right=False),
    Column("layers", "layers"),
    Column("parameters", "num_parameters", "{:,}".format),
    Column("bits", "bits"),
    Column("relative error", "relative_error", "{:.4f}".format),
    Column("of outputs", "output_error", "{:.4f}".format),
)
FIGURE_COLUMNS = (
    Column("MB", "size_bytes", lambda value: f"{value / 1e6:.1f}"),
    Column("bits/weight", "bits_per_weight", "{:.2f}".format),
    Column("KV cache", "kv"),
    Column("KLD", "kld", "{:.4f}".format),
    Column("top-1 %", "top1_agreement", lambda value: f"{value * 100:.1f}"),
    Column("ppl x", "perplexity_ratio", "{:.3f}".format),
    Column("cosine", "cosine", "{:.5f}".format),
    Column("flipped %", "flipped_labels", lambda value: f"{value * 100:.1f}"),
    Column("relative error", "relative_error", "{:.4f}".format),
)
GRAPH_COLUMNS = (
    Column("graph", "graph", align_right=False),
    Column("numbers", "method", align_right=False),
    Column("weights MB", "weight_bytes", lambda value: f"{value / 1e6:.1f}"),
    Column("its own MB", "own_bytes", lambda value: f"{value / 1e6:.1f}"),
)
_NUM_WORST = 5


def summarize(graphs: Mapping[str, Sequence[LayerReport]]) -> dict[str, Any]:
    """Return `layers`, one row per role and width, and `worst_layers`, by what rounding does to their outputs.

    What graphs share counts once; a second graph for prompts, which does the same again, not at all: see
    `describe_graphs`.

    Relative errors are sqrt(sum (w - w')^2 / sum w^2), and the same of the outputs x w^T: 0 is exact.
    """
    shared = {(one.name, one.role): one for role, part in graphs.items() if role != PREFILL for one in part}
    reports = list(shared.values())
    roles: dict[tuple[str, int], list[LayerReport]] = {}
    order = list(dict.fromkeys(report.role for report in reports))
    for report in sorted(reports, key=lambda one: (order.index(one.role), one.bits)):
        roles.setdefault((report.role, report.bits), []).append(report)
    rows = [
        {
            "role": role,
            "layers": len(group),
            "num_parameters": sum(report.num_parameters for report in group),
            "bits": bits,
            **_errors(group),
        }
        for (role, bits), group in roles.items()
    ]
    worst = sorted(reports, key=lambda one: -(_errors([one])["output_error"] or _errors([one])["relative_error"] or 0))
    single = [
        {"name": one.name, "bits": one.bits, "block_size": one.block_size, **_errors([one])}
        for one in worst[:_NUM_WORST]
    ]
    return {"layers": rows, "worst_layers": single}


def describe_graphs(
    parts: Mapping[str, Part],
    after: Mapping[str, OnnxModel],
    reports: Mapping[str, Sequence[LayerReport]],
    compared: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Return a row for each graph of a bundle that has a second one for prompts.

    Returns:
        `graph`, `method`, `weight_bytes`, `own_bytes` (what the bundle would be smaller by without it), the relative
        error of its outputs over all layers, and how far its answers moved.
    """
    rows = []
    for role, part in parts.items():
        others = [model for other, model in after.items() if other != role]
        rows.append(
            {
                "graph": role,
                "method": f"{part.plan.scheme.name}:{part.plan.method}",
                "weight_bytes": count_weight_bytes([after[role]]),
                "own_bytes": count_weight_bytes(after.values()) - count_weight_bytes(others),
                "output_error": _errors(reports[role])["output_error"],
                **compared.get(role, {}),
            }
        )
    return rows


def slow_forms(before: Iterable[OnnxModel], after: Iterable[OnnxModel]) -> list[str]:
    """Return the slow forms that `llmfast inspect` finds in the quantized graphs and not in the float ones."""
    known = {finding.rule.name for model in before for finding in lint(model)}
    return [
        f"{finding.rule.reason} [{finding.rule.name}: {len(finding.nodes)} nodes of {model.path.name}]"
        for model in after
        for finding in lint(model)
        if finding.rule.affects == "speed" and finding.rule.name not in known
    ]


def graph_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns of `describe_graphs` for people."""
    return [*GRAPH_COLUMNS, *(column for column in FIGURE_COLUMNS if all(column.key in row for row in rows))]


def figure_columns(figures: Mapping[str, Any]) -> list[Column]:
    """Return the columns of the figures that were measured."""
    return [column for column in FIGURE_COLUMNS if column.key in figures]


def spell_worst(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the worst layers as a line for people."""
    is_measured = any(row["output_error"] is not None for row in rows)
    parts = [f"{row['name']} {row['output_error'] or row['relative_error']:.3f}" for row in rows]
    return f"worst layers, by the error of their {'outputs' if is_measured else 'weights'}: {', '.join(parts)}"


def _errors(group: Sequence[LayerReport]) -> dict[str, float | None]:
    known = [one for one in group if one.output_power is not None]
    return {
        "relative_error": _ratio([(one.squared_error, one.power) for one in group]),
        "output_error": _ratio([(one.output_error or 0.0, one.output_power or 0.0) for one in known])
        if known
        else None,
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return math.sqrt(sum(error for error, _ in pairs) / max(sum(power for _, power in pairs), 1e-30))


def make_manifest(
    bundle: ModelBundle,
    parts: Mapping[str, Part],
    after: dict[str, OnnxModel],
    options: QuantizeOptions,
    measured: dict[str, Any],
) -> Manifest:
    """Return the manifest of a quantized bundle.

    Args:
        bundle: the float bundle.
        parts: its graphs by role, and what was done to them.
        after: the quantized ones.
        options: what was asked.
        measured: what is said of layers and answers.
    """
    plan, *_ = (part.plan for part in parts.values())
    source = bundle.manifest.source or {"id": bundle.model.name, "revision": None, "sha256": sha256(bundle.model)}
    parameters = num_parameters(bundle, [part.model for role, part in parts.items() if role != PREFILL])
    chosen: dict[str, Any] = {"budget": options.budget and asdict(options.budget), "kv": options.kv}
    if PREFILL in parts:
        second = parts[PREFILL].plan
        chosen[PREFILL] = {"method": f"{second.scheme.name}:{second.method}", **second.options}
    step = Step(
        stage="quantize",
        method=f"{plan.scheme.name}:{plan.method}",
        options={"include": options.include, "exclude": options.exclude}
        | {name: value for name, value in chosen.items() if value}
        | plan.options,
        versions=versions(),
        seed=options.calibration.seed,
        calibration=options.calibration.describe() if is_calibrated(parts, options) else None,
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
        measured={**bundle.manifest.measured, "quantize": measured},
    )


def versions() -> dict[str, str]:
    """Return the versions of what decides on the bytes that are written."""
    return {name: importlib.metadata.version(name) for name in ("numpy", "onnx")} | {"llmfast": llmfast.__version__}
