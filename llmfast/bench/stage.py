"""Measure bundles against a baseline: speed in interleaved rounds, memory, size, quality on given data."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from llmfast import registry, report
from llmfast.bench.contestant import Contestant, check_lengths, line_up, note_lacks
from llmfast.bench.machine import BUSY_LOAD_PER_CORE, describe_machine, load_per_core
from llmfast.bench.options import BenchOptions, per_shape
from llmfast.bench.quality import measure_quality
from llmfast.bench.rounds import run_rounds
from llmfast.bench.statistics import coverage, relative_spread
from llmfast.bench.table import print_document
from llmfast.bundle import SEQ2SEQ_TASKS, TEXT_GENERATION, UNKNOWN_TASK, sha256
from llmfast.errors import InputError, OptionError
from llmfast.runtime import resolve_threads
from llmfast.verdict import judge

__all__ = ["BenchOptions", "bench", "print_document"]

SCHEMA_VERSION = 1

# Below this the range of the samples covers less than 90 %, and chance passes for a difference.
FEWEST_ROUNDS = 5
# Speed figures that spread more than this need more rounds, or a quieter machine.
NOISY_SPREAD = 0.10

Metrics = dict[str, ModuleType]


def bench(models: Sequence[Path], options: BenchOptions, baseline: Path | None = None) -> dict[str, Any]:
    """Measure bundles and compare them with the baseline.

    Every bundle runs in a process of its own; all are open at once, so memory must hold them all.

    Args:
        models: bundle directories or .onnx files.
        options: what to measure, and how often.
        baseline: the bundle the others are compared with; None takes the first model.

    Returns:
        A document that JSON can hold: `schema_version`, `machine`, `settings`, `baseline` (a row's `bundle`),
        `rows` and `verdict` (one entry per gate and bundle). For speed a row has `<name>` (median over the
        rounds), `<name>_spread` ([low, high], 95 % bootstrap interval, None with one round), `<name>_ratio`
        (above 1 is better than the baseline) and its spread; for quality `<name>` (over all data) and
        `<name>_spread`. The figures of single rounds and units are under `samples`. Size, memory and loading
        are one observation each. What can't be measured is None.

    Raises:
        OptionError: an option that does not fit a bundle.
        InputError: a bundle or data file that is missing, malformed or unfit; bundles of different tasks.
        UnsupportedError: the provider can't run a bundle.
        ResourceError: memory or disk ran out.
        NativeCrashError: a bundle's process died; the message names the bundle.
    """
    machine = describe_machine() | {"threads": resolve_threads(options.threads)}
    contestants, reference = line_up(models, baseline)
    task = next((one.task for one in contestants if one.task != UNKNOWN_TASK), UNKNOWN_TASK)
    check_lengths(contestants, _lengths(task, options))
    metrics = _metrics_for(task)
    _check_gates(metrics, options)
    items = _prepare_data(_of_kind(metrics, "quality"), reference, options)
    _note_load(machine)
    if task == UNKNOWN_TASK and not items:
        report.note("note: no bundle says what its model is for: answers are not compared")

    units: dict[str, int] = {}
    steps = (1 + options.warmup + options.rounds + sum(map(len, items.values()))) * len(contestants)
    with ExitStack() as stack, report.progress("bench", total=steps) as advance:
        for one in contestants:
            advance(0, f"opening {one.label}")
            one.start(stack, options, _max_length(task, options))
            advance(1)
        if items:
            _check_vocabularies(task, contestants, reference)
        run_rounds(_of_kind(metrics, "speed"), contestants, reference, options, advance)
        _describe(_of_kind(metrics, "static"), contestants)
        for name, prepared in items.items():
            units[metrics[name].UNIT] = measure_quality(
                name, metrics[name], contestants, reference, prepared, options.seed, advance
            )
    _note_noise(_of_kind(metrics, "speed"), contestants, options)
    _note_placement(contestants)
    rows = [_row(one, options) for one in contestants]
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine,
        "settings": _settings(options, units),
        "baseline": reference.label,
        "rows": rows,
        "verdict": judge(rows, reference.label, options.gates),
    }


def _metrics_for(task: str) -> Metrics:
    """Return the metrics of a task in table order."""
    plugins = {name: registry.load("bench.metrics", name) for name in registry.names("bench.metrics")}
    fitting = {name: plugin for name, plugin in plugins.items() if not plugin.TASKS or task in plugin.TASKS}
    return dict(sorted(fitting.items(), key=lambda pair: pair[1].ORDER))


def _check_gates(metrics: Metrics, options: BenchOptions) -> None:
    """Refuse a gate on what this run will not measure: it must not pass unnoticed."""
    keys = {
        name: [key for template in metric.HIGHER_IS_BETTER for key in per_shape(template, options.shape_sizes)]
        for name, metric in metrics.items()
    }
    gated = {key for name in keys for key in keys[name] if metrics[name].KIND != "speed"}
    speeds = [key for name in _of_kind(metrics, "speed") for key in keys[name]]
    of_quality = {key for name in _of_kind(metrics, "quality") for key in keys[name]}
    for gate in options.gates:
        asked = gate.figure.removesuffix("_ratio")
        if gate.kind == "min" and asked not in speeds:
            raise OptionError(f"--min-speedup `{asked}`: no speed of this run", f"choose from: {', '.join(speeds)}")
        if gate.kind == "max" and gate.figure not in gated:
            raise OptionError(f"gate on `{gate.figure}`: this run does not measure it")
        if gate.figure in of_quality and options.data is None:
            raise OptionError(f"gate on `{gate.figure}` needs --data", "give the text to measure quality on")


def _of_kind(metrics: Mapping[str, ModuleType], kind: str) -> Metrics:
    return {name: metric for name, metric in metrics.items() if kind == metric.KIND}


def _lengths(task: str, options: BenchOptions) -> dict[str, int]:
    """Return what the options ask a bundle of this task to hold: flag -> tokens."""
    if task in SEQ2SEQ_TASKS:
        # The start token takes a position of the target.
        return {"--prompt-tokens": options.prompt_tokens, "--output-tokens + 1": options.output_tokens + 1}
    if task != TEXT_GENERATION:
        speeds = [key for metric in _metrics_for(task).values() for key in metric.HIGHER_IS_BETTER]
        shapes = options.shape_sizes if any("{shape}" in key for key in speeds) else {}
        return {f"--shapes {shape}": length for shape, (_, length) in shapes.items()}
    lengths = {"--prompt-tokens + --output-tokens": options.prompt_tokens + options.output_tokens}
    return lengths | ({"--seq-len": options.seq_len} if options.data else {})


def _max_length(task: str, options: BenchOptions) -> int | None:
    if task in SEQ2SEQ_TASKS:
        return options.output_tokens
    return max(_lengths(task, options).values()) if task == TEXT_GENERATION else None


def _prepare_data(metrics: Metrics, baseline: Contestant, options: BenchOptions) -> dict[str, list[Any]]:
    """Return quality metric -> items of the data, before anything is opened: a bad file fails at once."""
    needy = {name: metric for name, metric in metrics.items() if metric.DATA}
    if options.data is None:
        for metric in needy.values():
            report.note(f"note: speed only; for quality give --data FILE, {metric.DATA}")
    elif not options.data.is_file():
        raise InputError(f"not found: `{options.data}`", "--data takes a text file")
    return {
        name: metric.prepare(baseline.bundle, options.data, options)
        for name, metric in metrics.items()
        if (name not in needy or options.data is not None) and note_lacks(metric, name, [baseline])
    }


def _check_vocabularies(task: str, contestants: Sequence[Contestant], baseline: Contestant) -> None:
    """Refuse to compare predictions over different vocabularies."""
    for one in contestants:
        if task in (TEXT_GENERATION, *SEQ2SEQ_TASKS) and one.vocab_size not in (None, baseline.vocab_size):
            raise InputError(
                f"`{one.label}` has {one.vocab_size} token ids, `{baseline.label}` has {baseline.vocab_size}",
                "their predictions can't be compared: leave out --data, or choose another baseline",
            )


def _describe(metrics: Metrics, contestants: Sequence[Contestant]) -> None:
    for one in contestants:
        one.figures = one.call("describe", list(metrics)) | one.figures


def _settings(options: BenchOptions, units: dict[str, int]) -> dict[str, Any]:
    """Return all options, resolved; a data file by name and content, as its path means nothing elsewhere."""
    settings = asdict(options) | {"threads": resolve_threads(options.threads)}
    del settings["gates"]  # the verdict repeats them
    settings["shapes"] = list(options.shape_sizes)
    if options.data is not None:
        settings["data"] = {"name": options.data.name, "sha256": sha256(options.data)} | units
    return settings


def _row(one: Contestant, options: BenchOptions) -> dict[str, Any]:
    figures = {key: list(value) if isinstance(value, tuple) else value for key, value in one.figures.items()}
    facts = {"bundle": one.label, "task": one.task, "provider": options.provider, "placement": one.placement}
    return facts | figures | {"samples": one.samples}


def _note_load(machine: dict[str, Any]) -> None:
    if load_per_core(machine) > BUSY_LOAD_PER_CORE:
        report.note(
            f"note: the machine is busy (load {machine['load_average']:.1f} on {machine['cores']} cores): "
            "expect noisy speed figures"
        )


def _note_noise(metrics: Metrics, contestants: Sequence[Contestant], options: BenchOptions) -> None:
    templates = [template for metric in metrics.values() for template in metric.HIGHER_IS_BETTER]
    keys = [key for template in templates for key in per_shape(template, options.shape_sizes)]
    if keys and options.rounds < FEWEST_ROUNDS:
        report.note(
            f"note: --rounds {options.rounds} is little: its intervals cover {coverage(options.rounds):.0%}, "
            f"{FEWEST_ROUNDS} rounds {coverage(FEWEST_ROUNDS):.0%}"
        )
    for one in contestants:
        spreads = {key: relative_spread(one.figures[key], one.figures[f"{key}_spread"]) for key in keys}
        noisy = [f"{key} ±{spread:.0%}" for key, spread in spreads.items() if spread > NOISY_SPREAD]
        if noisy:
            report.note(f"note: `{one.label}` is noisy ({', '.join(noisy)}): a quiet machine or more --rounds help")


def _note_placement(contestants: Sequence[Contestant]) -> None:
    for one in contestants:
        if len(one.placement) > 1:
            parts = ", ".join(f"{nodes} on {provider}" for provider, nodes in one.placement.items())
            report.note(f"note: the nodes of `{one.label}` run on several providers: {parts}")
