"""What a quantization did to the layers, as rows for people and for the manifest."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
    Column("KLD", "kld", "{:.4f}".format),
    Column("top-1 %", "top1_agreement", lambda value: f"{value * 100:.1f}"),
    Column("ppl x", "perplexity_ratio", "{:.3f}".format),
    Column("cosine", "cosine", "{:.5f}".format),
    Column("flipped %", "flipped_labels", lambda value: f"{value * 100:.1f}"),
    Column("relative error", "relative_error", "{:.4f}".format),
)
_NUM_WORST = 5


def summarize(reports: Sequence[LayerReport]) -> dict[str, Any]:
    """Return `layers`, one row per role and width, and `worst_layers`, by what rounding does to their outputs.

    Relative errors are sqrt(sum (w - w')^2 / sum w^2), and the same of the outputs x w^T: 0 is exact.
    """
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


def figure_columns(figures: Mapping[str, Any]) -> list[Column]:
    """Return the columns of the figures that were measured."""
    return [column for column in FIGURE_COLUMNS if column.key in figures]


def spell_worst(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the worst layers as a line for people."""
    parts = [f"{row['name']} {row['output_error'] or row['relative_error']:.3f}" for row in rows]
    return f"worst layers, by the error of their outputs: {', '.join(parts)}"


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
