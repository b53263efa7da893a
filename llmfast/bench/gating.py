"""The gates of a run: what the user typed, against what this run measures."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmfast import registry
from llmfast.bench.options import BenchOptions
from llmfast.bench.workload import Workload, per_case
from llmfast.errors import OptionError
from llmfast.verdict import Gate, parse_drop

_RATIO = "_ratio"


def resolve_gates(metrics: Mapping[str, Any], options: BenchOptions, workload: Workload) -> tuple[Gate, ...]:
    """Return the gates on this run's figures; one on a swept figure becomes one for each length.

    Raises:
        OptionError: a gate on what this run will not measure: it must not pass unnoticed.
    """
    kinds = {
        key: metric.KIND
        for metric in metrics.values()
        for template in metric.HIGHER_IS_BETTER
        for key in per_case(template, workload.shapes)
    }
    quality = [metric for metric in metrics.values() if metric.KIND == "quality"]
    higher = {key: is_higher for metric in quality for key, is_higher in metric.HIGHER_IS_BETTER.items()}
    compared = [key for metric in quality for key in metric.COMPARED]
    drops = [one for text in options.max_drops for one in of_every_task(text, higher)]
    gates = [*options.gates, *(parse_drop(text, higher, compared) for text in drops)]
    return tuple(one for gate in gates for one in _resolve(gate, kinds, options, workload, metrics))


def _resolve(
    gate: Gate, kinds: Mapping[str, str], options: BenchOptions, workload: Workload, metrics: Mapping[str, Any]
) -> list[Gate]:
    if gate.kind == "min" and gate.figure.endswith(_RATIO):
        asked, speeds = gate.figure.removesuffix(_RATIO), [key for key, kind in kinds.items() if kind == "speed"]
        if asked in speeds:
            return [gate]
        swept = [key for key in _cases(asked, workload) if key in speeds]
        if not swept:
            raise OptionError(f"--min-speedup `{asked}`: no speed of this run", f"choose from: {', '.join(speeds)}")
        return [replace(gate, figure=f"{key}{_RATIO}") for key in swept]
    figure = gate.figure.removesuffix("_change")
    found = [figure] if figure in kinds else [key for key in _cases(figure, workload) if key in kinds]
    if not found:
        asked_by = _option_of(figure)
        if asked_by is not None and getattr(options, asked_by) is None:
            raise OptionError(f"gate on `{gate.figure}` needs --{asked_by.replace('_', '-')}")
        raise OptionError(f"gate on `{gate.figure}`: this run does not measure it")
    needy = {key for one in metrics.values() if one.KIND == "quality" and one.DATA for key in one.HIGHER_IS_BETTER}
    if figure in needy and options.data is None:
        raise OptionError(f"gate on `{gate.figure}` needs --data", "give the text to measure quality on")
    return [replace(gate, figure=gate.figure.replace(figure, key, 1)) for key in found]


def of_every_task(text: str, figures: Mapping[str, bool]) -> list[str]:
    """Return `METRIC=X` once for every task that has the metric, `TASK.METRIC=X`; as it is where none has."""
    metric, *rest = text.split("=", 1)
    named = [figure for figure in figures if figure.partition(".")[2] == metric.replace("-", "_")]
    return ["=".join([figure, *rest]) for figure in named] or [text]


def _option_of(figure: str) -> str | None:
    """Return the option without which no run measures a figure, None where there is none."""
    plugins = [registry.load("bench.metrics", name) for name in registry.names("bench.metrics")]
    return next((getattr(one, "OPTION", None) for one in plugins if figure in one.HIGHER_IS_BETTER), None)


def _cases(figure: str, workload: Workload) -> list[str]:
    return [f"{figure}_{shape}" for shape in workload.shapes]
