"""The charts of a report: Plotly's traces, and a table with the same numbers for who can't see them.

Traces follow https://plotly.com/javascript/reference/. Plotly reads a little HTML in every text it draws, so names go
through `_text`.
"""

import html
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmfast.report import printable

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito 2008, Color Universal Design: told apart by colour-blind readers, on white and on black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A00", "#7A6FC9")
_REST = "#8c8c8c"
_MOST_PARTS = 8
# What tells how good answers are, the most telling first: figure, axis title, whether more is better.
_QUALITIES = (
    ("kld", "KL divergence, nats", False),
    ("accuracy", "accuracy", True),
    ("f1", "F1", True),
    ("spearman", "Spearman's rank correlation", True),
    ("chrf", "chrF", True),
    ("exact_match", "exact match", True),
    ("cosine_to_baseline", "cosine to the baseline", True),
    ("output_error", "error of the outputs", False),
    ("perplexity", "perplexity", False),
)
_SPEEDS = ("decode_tokens_per_s", "samples_per_s", "tokens_per_s", "prefill_tokens_per_s", "latency_s")


@dataclass(frozen=True)
class Chart:
    """One chart and the table under it.

    Attributes:
        name: the anchor in the page.
        title: what it shows.
        reading: a sentence on how to read it.
        columns: the table's titles.
        rows: the table's cells.
        traces: Plotly's.
        layout: Plotly's, over the page's own.
        height: CSS pixels.
    """

    name: str
    title: str
    reading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 360


def draw_all(document: Mapping[str, Any]) -> list[Chart]:
    """Return the charts that the document has figures for."""
    rows = [row for row in document["rows"] if "error" not in row]
    colours = {row["bundle"]: PALETTE[index % len(PALETTE)] for index, row in enumerate(document["rows"])}
    drawn = [_trade_off(rows, colours), _ratios(rows, document["baseline"], colours), *_latencies(rows, colours)]
    drawn += [*_times(rows), _sizes(rows), *_sensitivities(rows)]
    return [chart for chart in drawn if chart is not None]


def _trade_off(rows: Rows, colours: Mapping[str, str]) -> Chart | None:
    """Speed against quality, or against size where no quality was measured; the line joins what nothing beats."""
    speed = next((key for stem in _SPEEDS for key in _keys(rows, f"{stem}(_.*)?_ratio")), None)
    quality = next((one for one in _QUALITIES if sum(row.get(one[0]) is not None for row in rows) > 1), None)
    figure, title, more_is_better = quality or ("size_bytes", "size, MB", False)
    if speed is None or len(rows) < 2:
        return None
    scale = 1e-6 if figure == "size_bytes" else 1
    points = [
        (row, float(row[speed]), (row.get(figure) or 0.0) * scale)
        for row in rows
        if row.get(speed) is not None and (row.get(figure) is not None or figure == "kld")
    ]
    best = _frontier([(x, y if more_is_better else -y) for _, x, y in points])
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False,
            "x": [points[index][1] for index in best], "y": [points[index][2] for index in best],
            "line": {"dash": "dot", "color": _REST, "width": 1.5},
        }
    ]  # fmt: skip
    largest = max(row["size_bytes"] for row, *_ in points)
    for row, x, y in points:
        low, high = row.get(f"{speed}_spread") or (x, x)
        traces.append(
            {
                "type": "scatter", "mode": "markers+text", "name": _text(row["bundle"]), "showlegend": False,
                "x": [x], "y": [y], "text": [_text(row["bundle"])], "textposition": "top center", "cliponaxis": False,
                "error_x": {"array": [max(high - x, 0)], "arrayminus": [max(x - low, 0)], "thickness": 1},
                "marker": {"color": colours[row["bundle"]], "size": 10 + 24 * (row["size_bytes"] / largest) ** 0.5},
                "hovertemplate": f"%{{x:.2f}} x, {html.escape(title)} %{{y:.4g}}, {row['size_bytes'] / 1e6:.1f} MB",
            }
        )  # fmt: skip
    name = _spell_key(speed.removesuffix("_ratio"))
    better = "higher" if more_is_better else "lower"
    table = [
        [row["bundle"], f"{x:.2f}", f"{y:.4g}", f"{row['size_bytes'] / 1e6:.1f}", "yes" if index in best else "no"]
        for index, (row, x, y) in enumerate(points)
    ]
    reading = (
        f"To the right is faster, {better} is better. A disc's area is the bundle's size; nothing here beats the "
        "bundles on the dotted line."
    )
    axes = {
        "xaxis": {"title": f"{name}, times the baseline's"},
        "yaxis": {"title": title, "rangemode": "normal" if more_is_better else "tozero"},
    }
    columns = ["bundle", f"{name}, x", title, "MB", "on the line"]
    heading = "Speed against quality" if quality else "Speed against size"
    return Chart("trade-off", heading, reading, columns, table, traces, axes, 420)


def _ratios(rows: Rows, baseline: str, colours: Mapping[str, str]) -> Chart | None:
    """Every figure that is compared with the baseline's, with its interval."""
    keys = _keys(rows, ".*_ratio")
    others = [row for row in rows if row["bundle"] != baseline]
    if not keys or not others:
        return None
    names = {key: _spell_key(key.removesuffix("_ratio")) for key in keys}
    traces, table = [], []
    for row in others:
        ratios = {key: float(row[key]) for key in keys if row.get(key) is not None}
        spreads = {key: row.get(f"{key}_spread") or (ratio, ratio) for key, ratio in ratios.items()}
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": _text(row["bundle"]),
                "x": list(ratios.values()), "y": [names[key] for key in ratios],
                "marker": {"color": colours[row["bundle"]], "size": 10},
                "error_x": {
                    "array": [max(spreads[key][1] - ratio, 0) for key, ratio in ratios.items()],
                    "arrayminus": [max(ratio - spreads[key][0], 0) for key, ratio in ratios.items()],
                },
                "hovertemplate": "%{y}: %{x:.3f} x",
            }
        )  # fmt: skip
        for key, ratio in ratios.items():
            low, high = spreads[key]
            word = row["verdict"].get(key.removesuffix("_ratio"), "not judged")
            table.append([names[key], row["bundle"], f"{ratio:.3f}", f"{low:.3f} - {high:.3f}", word])
    ends = {"x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper"}
    line = {"type": "line", **ends, "line": {"dash": "dash", "color": _REST}}
    return Chart(
        "ratios",
        f"Against {printable(baseline)}",
        "More than 1 is better than the baseline; bars are 95 % intervals. "
        "A bar across the dashed line shows no difference.",
        ["figure", "bundle", "ratio", "95 % interval", "verdict"],
        table,
        traces,
        {"xaxis": {"title": "times the baseline's"}, "yaxis": {"autorange": "reversed"}, "shapes": [line]},
        160 + 34 * len(keys),
    )


def _latencies(rows: Rows, colours: Mapping[str, str]) -> Iterator[Chart]:
    """The single measurements behind each speed."""
    for key in dict.fromkeys(key for row in rows for key in row.get("latencies", {})):
        samples = {row["bundle"]: np.array(row["latencies"][key]) * 1e3 for row in rows if row["latencies"].get(key)}
        traces = [
            {
                "type": "box", "name": _text(name), "x": values.round(4).tolist(), "boxpoints": "all", "jitter": 0.4,
                "pointpos": 0, "marker": {"color": colours[name], "size": 3}, "line": {"width": 1}, "showlegend": False,
                "hoverinfo": "x",
            }
            for name, values in samples.items()
        ]  # fmt: skip
        table = [
            [name, str(len(values)), *(f"{figure:.3f}" for figure in np.percentile(values, [50, 95, 99, 100]))]
            for name, values in samples.items()
        ]
        yield Chart(
            f"latencies-{_anchor(key)}",
            f"Distribution of {_spell_key(key)}",
            "Every point is one measurement; the box holds the middle half of them.",
            ["bundle", "measurements", "median ms", "p95 ms", "p99 ms", "slowest ms"],
            table,
            traces,
            {"xaxis": {"title": "ms", "rangemode": "tozero"}, "yaxis": {"autorange": "reversed"}},
            130 + 60 * len(samples),
        )


def _times(rows: Rows) -> Iterator[Chart]:
    """Where the time goes: kernels, phase by phase."""
    profiled = [row for row in rows if row.get("profile")]
    for phase in dict.fromkeys(one["phase"] for row in profiled for one in row["profile"]["phases"]):
        parts: dict[str, dict[str, float]] = {}
        unit = ""
        for row in profiled:
            for one in row["profile"]["phases"]:
                if one["phase"] == phase:
                    spent = {part["name"]: part["seconds"] * 1e3 for part in one["operators"]}
                    parts[row["bundle"]], unit = spent | {"(outside of kernels)": one["outside_s"] * 1e3}, one["unit"]
        yield _stack(
            f"time-{_anchor(phase)}",
            f"Time by operator: {phase}",
            f"Milliseconds a {unit}, as ONNX Runtime's profile has them; profiling itself takes a little.",
            parts,
            f"ms a {unit}",
            lambda value: f"{value:.3f}",
        )


def _sizes(rows: Rows) -> Chart | None:
    """Where the bytes are: layers by role."""
    parts: dict[str, dict[str, float]] = {}
    for row in rows:
        sums: dict[str, float] = defaultdict(float)
        for layer in row.get("layers", ()):
            sums[layer["role"]] += layer["bytes"] / 1e6
        if sums:
            parts[row["bundle"]] = sums
    title, reading = "Size by kind of layer", "Megabytes of weights, scales included."
    return _stack("size", title, reading, parts, "MB", lambda value: f"{value:.2f}") if parts else None


def _sensitivities(rows: Rows) -> Iterator[Chart]:
    """What each layer costs when it is rounded, where quantize measured it."""
    for row in rows:
        damages: dict[str, dict[int, float]] = defaultdict(dict)
        table = []
        for layer in row.get("layers", ()):
            if layer.get("damage") is not None:
                block = re.search(r"\.(\d+)\.", layer["name"])
                damages[layer["role"]][int(block.group(1)) if block else 0] = layer["damage"]
                table.append([layer["name"], layer["weights"], f"{layer['damage']:.3g}"])
        if not damages:
            continue
        blocks = sorted({block for values in damages.values() for block in values})
        heat = [[values.get(block) for block in blocks] for values in damages.values()]
        logs = [[None if value is None else float(np.log10(max(value, 1e-12))) for value in line] for line in heat]
        traces = [
            {
                "type": "heatmap", "x": blocks, "y": [_text(role) for role in damages], "z": logs, "text": heat,
                "colorscale": "Cividis", "colorbar": {"title": "log10"}, "hovertemplate": "%{y} %{x}: %{text:.3g}",
            }
        ]  # fmt: skip
        yield Chart(
            f"sensitivity-{_anchor(row['bundle'])}",
            f"What each layer of {printable(row['bundle'])} costs",
            "How far the answers move when this weight alone is rounded to 4 bit; bright layers want more bits.",
            ["layer", "stored as", "damage"],
            table,
            traces,
            {"xaxis": {"title": "block"}, "yaxis": {"autorange": "reversed"}},
            170 + 30 * len(damages),
        )


def _stack(
    name: str,
    title: str,
    reading: str,
    parts: Mapping[str, Mapping[str, float]],
    unit: str,
    spell: Callable[[float], str],
) -> Chart:
    """Return bars, one a bundle, made of the largest parts and the rest; the table has all parts."""
    sums: dict[str, float] = defaultdict(float)
    for values in parts.values():
        for part, value in values.items():
            sums[part] += value
    ordered = sorted(sums, key=lambda part: -sums[part])
    shown, rest = ordered[:_MOST_PARTS], ordered[_MOST_PARTS:]
    bars = [(part, [values.get(part, 0.0) for values in parts.values()]) for part in shown]
    if rest:
        bars.append(("everything else", [sum(values.get(part, 0.0) for part in rest) for values in parts.values()]))
    traces = [
        {
            "type": "bar", "orientation": "h", "name": _text(part),
            "y": [_text(bundle) for bundle in parts], "x": values,
            "marker": {"color": (*PALETTE, _REST)[index]}, "hovertemplate": f"{_text(part)}: %{{x:.3f}} {unit}",
        }
        for index, (part, values) in enumerate(bars)
    ]  # fmt: skip
    table = [[part, *(spell(values[part]) if part in values else "-" for values in parts.values())] for part in ordered]
    layout = {"barmode": "stack", "xaxis": {"title": unit}, "yaxis": {"autorange": "reversed"}}
    return Chart(name, title, reading, ["", *parts], table, traces, layout, 190 + 46 * len(parts))


def _frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other one is at least as good as in both, from left to right."""
    best = [
        index
        for index, point in enumerate(points)
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
    ]
    return sorted(best, key=lambda index: points[index])


def _keys(rows: Rows, pattern: str) -> list[str]:
    """Return the figures of this name that some row has a number for, in order."""
    return list(
        dict.fromkeys(
            key for row in rows for key, value in row.items() if value is not None and re.fullmatch(pattern, key)
        )
    )


def _spell_key(key: str) -> str:
    """Return a figure's name for people: `decode_tokens_per_s` as `decode tokens/s`."""
    return re.sub(r"_s(?=_|$)", "", key.replace("_per_s", "/s")).replace("_", " ")


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x"


def _text(name: str) -> str:
    """Return a foreign string as Plotly shows it literally."""
    return html.escape(printable(name))
