"""Measure bundles against a baseline: speed in interleaved rounds, memory, size, quality on given data."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast import registry, report
from llmfast.bench.contestant import Contestant, line_up, note_lacks
from llmfast.bench.document import SCHEMA_VERSION, hash_model
from llmfast.bench.gating import resolve_gates
from llmfast.bench.harness.run import measure_tasks, metrics_of
from llmfast.bench.layers import describe_layers
from llmfast.bench.machine import describe_machine
from llmfast.bench.options import BenchOptions
from llmfast.bench.processes import Processes
from llmfast.bench.profile import profile_all
from llmfast.bench.quality import measure_quality
from llmfast.bench.roofline import file_rooflines
from llmfast.bench.rounds import Rounds
from llmfast.bench.statistics import coverage, relative_spread
from llmfast.bench.table import print_document
from llmfast.bench.watch import Watch
from llmfast.bench.workload import Workload, per_case, plan
from llmfast.bundle import TEXT_GENERATION, UNKNOWN_TASK, sha256
from llmfast.errors import InputError, OptionError
from llmfast.runtime import resolve_threads
from llmfast.verdict import judge

if TYPE_CHECKING:
    from llmfast.bench.harness.tasks import Tasks

__all__ = ["BenchOptions", "bench", "print_document"]

# Below this the range of the samples covers less than 90 %, and chance passes for a difference.
FEWEST_ROUNDS = 5
# Speed figures that spread more than this need more rounds, or a quieter machine.
NOISY_SPREAD = 0.10

Metrics = dict[str, Any]


def bench(
    models: Sequence[Path] | Mapping[str, Path],
    options: BenchOptions,
    baseline: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure bundles and compare them with the baseline.

    Every bundle runs in a process of its own. All are open at once, or where memory does not hold them each is
    opened for its turns.

    Args:
        models: bundle directories or .onnx files; or these by the names that the document shall have.
        options: what to measure, and how often.
        baseline: the bundle the others are compared with; None takes the first model.
        clock: monotonic seconds, for `max_time`.

    Returns:
        A document that JSON can hold, as `document.schema.json` beside this file says. For speed a row has `<name>`
        (median over the rounds), `<name>_spread` ([low, high], 95 % bootstrap interval, None with one round),
        `<name>_ratio` (above 1 is better than the baseline) and its spread, which knows of luck that stays with a
        process, see `statistics.launch_interval`; for quality `<name>` (over all data),
        `<name>_spread` and, where a figure means something alone, `<name>_change` against the baseline.
        `verdict` of a row says of every figure compared whether it is better, worse, equal or inconclusive. The
        figures of single rounds and units are under `samples`. Size, memory and loading are one observation each.
        What can't be measured is None. A bundle that failed has `error` and no figures.

    Raises:
        OptionError: an option that does not fit a bundle.
        InputError: a bundle or data file that is missing, malformed or unfit; bundles of different tasks.
        UnsupportedError: the provider can't run the baseline.
        ResourceError: memory or disk ran out.
        NativeCrashError: the baseline's process died; the message names the bundle.
    """
    contestants, reference = line_up(models, baseline, options)
    task = next((one.task for one in contestants if one.task != UNKNOWN_TASK), UNKNOWN_TASK)
    contexts = [(one.label, one.bundle.manifest.architecture.get("context_length")) for one in contestants]
    workload = plan(task, options, contexts)
    metrics = _metrics_for(task)
    tasks = _load_tasks(task, contestants, options)
    of_tasks = {} if tasks is None else metrics_of(tasks)
    gates = resolve_gates(metrics | of_tasks, options, workload)
    _compare_tokenizers(task, contestants, reference, options)
    items = _prepare_data(_of_kind(metrics, "quality"), reference, replace(options, seq_len=workload.seq_len))
    machine = describe_machine() | {"threads": reference.threads}
    watch = Watch.start()
    if task == UNKNOWN_TASK and not items:
        report.note("note: no bundle says what its model is for: answers are not compared")

    units: dict[str, int] = {}
    rounds = options.warmup + options.fewest_rounds
    steps = (1 + rounds + sum(map(len, items.values())) + (tasks is not None)) * len(contestants)
    with (
        Processes(contestants, options, workload, _of_kind(metrics, "static")) as processes,
        report.progress("bench", total=steps) as advance,
    ):
        opened = clock()
        processes.open_all(advance)
        if items:
            _compare_vocabularies(task, contestants, reference)
        speed = Rounds(
            _of_kind(metrics, "speed"),
            contestants,
            reference,
            options,
            workload,
            processes.turn,
            processes.one_at_a_time,
            clock() - opened,
            clock,
        )
        counted = speed.run(advance)
        processes.describe_all()
        warnings = watch.finish([one.worker.pid for one in contestants if one.worker is not None])
        for name, prepared in items.items():
            units[metrics[name].UNIT] = measure_quality(
                name, metrics[name], contestants, reference, prepared, options.seed, processes, advance
            )
        asked = None
        if tasks is not None:
            asked = measure_tasks(tasks, of_tasks, contestants, reference, options, advance)
    if task == TEXT_GENERATION:
        machine |= file_rooflines(contestants, workload)
    if options.profile:
        profile_all(contestants, options, workload)
    warnings += _noise(_of_kind(metrics, "speed"), contestants, workload, counted)
    for warning in warnings:
        report.note(f"note: {warning}")
    _note_placement(contestants)
    rows = [_row(one) for one in contestants]
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine,
        "settings": _settings(options, workload, counted, units) | {"tasks": asked},
        "warnings": warnings,
        "baseline": reference.label,
        "rows": rows,
        "verdict": judge(rows, reference.label, gates, options.inconclusive),
    }


def _load_tasks(task: str, contestants: Sequence[Contestant], options: BenchOptions) -> "Tasks | None":
    """Load the tasks of lm-eval that were asked for, before anything is opened: a bad name fails at once."""
    if not options.tasks:
        return None
    if task != TEXT_GENERATION or any(one.bundle.companion("tokenizer.json") is None for one in contestants):
        raise OptionError("--tasks: lm-eval asks models that generate text and have a tokenizer", "leave it out")
    from llmfast.bench.harness.tasks import load_tasks

    return load_tasks(options)


def _metrics_for(task: str) -> Metrics:
    """Return the metrics of a task in table order."""
    plugins = {name: registry.load("bench.metrics", name) for name in registry.names("bench.metrics")}
    fitting = {name: plugin for name, plugin in plugins.items() if not plugin.TASKS or task in plugin.TASKS}
    return dict(sorted(fitting.items(), key=lambda pair: pair[1].ORDER))


def _of_kind(metrics: Mapping[str, Any], kind: str) -> Metrics:
    return {name: metric for name, metric in metrics.items() if kind == metric.KIND}


def _prepare_data(metrics: Metrics, baseline: Contestant, options: BenchOptions) -> dict[str, Collection[Any]]:
    """Return quality metric -> items of the data, before anything is opened: a bad file fails at once."""
    needy = {name: metric for name, metric in metrics.items() if metric.DATA}
    if options.data is None and not options.tasks:
        for metric in list(needy.values())[:1]:
            report.note(f"note: speed only; for quality give --data FILE, {metric.DATA}")
    elif options.data is not None and not options.data.is_file():
        raise InputError(f"not found: `{options.data}`", "--data takes a text file")
    prepared = {
        name: metric.prepare(baseline.bundle, options.data, options)
        for name, metric in metrics.items()
        if (name not in needy or options.data is not None) and note_lacks(metric, name, [baseline])
    }
    return {name: items for name, items in prepared.items() if len(items)}


def _compare_tokenizers(
    task: str, contestants: Sequence[Contestant], baseline: Contestant, options: BenchOptions
) -> None:
    """Find the bundles whose tokens are not the baseline's: their predictions can't be compared one by one."""
    if task != TEXT_GENERATION or options.data is None or len(contestants) < 2:
        return
    from llmfast.tokenizer import Tokenizer

    files = {one: one.bundle.companion("tokenizer.json") for one in contestants}
    reference = files[baseline]
    if reference is None:
        return
    digest = sha256(reference)
    for one, file in files.items():
        if file is None or file == reference or sha256(file) == digest:
            continue
        ours, theirs = Tokenizer.load(one.bundle.path), Tokenizer.load(baseline.bundle.path)
        one.same_tokens = ours.vocabulary == theirs.vocabulary
        if not one.same_tokens:
            report.note(
                f"note: `{one.label}` has another tokenizer than `{baseline.label}`: there is no KL divergence between "
                "them, nor do perplexities compare; bits per byte do"
            )


def _compare_vocabularies(task: str, contestants: Sequence[Contestant], baseline: Contestant) -> None:
    """Refuse to compare predictions over different vocabularies of one tokenizer."""
    for one in contestants:
        if not one.same_tokens or one.failure is not None or task == UNKNOWN_TASK:
            continue
        if one.vocab_size is not None and one.vocab_size != baseline.vocab_size:
            raise InputError(
                f"`{one.label}` has {one.vocab_size} token ids, `{baseline.label}` has {baseline.vocab_size}",
                "their predictions can't be compared: leave out --data, or choose another baseline",
            )


def _settings(options: BenchOptions, workload: Workload, rounds: int, units: dict[str, int]) -> dict[str, Any]:
    """Return all options, resolved; a data file by name and content, as its path means nothing elsewhere."""
    settings = asdict(options)
    for name in ("gates", "max_drops", "inconclusive"):
        del settings[name]  # the verdict repeats them
    for name in ("tasks_dir", "limit", "num_fewshot", "download"):
        del settings[name]  # said under `tasks`, or without meaning elsewhere
    settings |= {
        "prompt_tokens": sorted({length for _, length in workload.shapes.values()}),
        "batch": sorted({batch for batch, _ in workload.shapes.values()}),
        "output_tokens": workload.output_tokens,
        "shapes": list(workload.shapes),
        "seq_len": workload.seq_len,
        "rounds": rounds,
        "threads": [resolve_threads(count) for count in _as_list(options.threads)],
        "provider": list(options.providers),
    }
    if options.data is not None:
        settings["data"] = {"name": options.data.name, "sha256": sha256(options.data)} | units
    return settings


def _as_list(threads: int | tuple[int, ...] | None) -> Sequence[int | None]:
    return threads if isinstance(threads, tuple) else (threads,)


def _row(one: Contestant) -> dict[str, Any]:
    figures = {key: list(value) if isinstance(value, tuple) else value for key, value in one.figures.items()}
    facts: dict[str, Any] = {
        "bundle": one.label,
        "task": one.task,
        "provider": one.provider,
        "threads": one.threads,
        "placement": one.placement,
        "energy_source": one.energy_source or None,
        "model_sha256": hash_model(one.bundle),
        "layers": describe_layers(one.bundle),
    }
    if one.failure is not None:
        error = {"kind": type(one.failure).__name__, "message": one.failure.message, "hint": one.failure.hint}
        facts["error"] = error | {"exit_code": one.failure.exit_code}
    if one.profile:
        facts["profile"] = one.profile
    return facts | figures | {"verdict": one.verdict, "samples": one.samples, "latencies": one.latencies}


def _noise(metrics: Metrics, contestants: Sequence[Contestant], workload: Workload, rounds: int) -> list[str]:
    """Return what to say about speeds that are not well known."""
    templates = [
        template for metric in metrics.values() for template in metric.HIGHER_IS_BETTER
        if any(template in column.key for column in metric.COLUMNS)
    ]  # fmt: skip
    keys = [key for template in templates for key in per_case(template, workload.shapes)]
    warnings = []
    if keys and rounds < FEWEST_ROUNDS:
        warnings.append(
            f"--rounds {rounds} is little: its intervals cover {coverage(rounds):.0%}, "
            f"{FEWEST_ROUNDS} rounds {coverage(FEWEST_ROUNDS):.0%}"
        )
    for one in contestants:
        spreads = {key: relative_spread(one.figures.get(key), one.figures.get(f"{key}_spread")) for key in keys}
        noisy = [f"{key} ±{spread:.0%}" for key, spread in spreads.items() if spread > NOISY_SPREAD]
        if noisy:
            warnings.append(f"`{one.label}` is noisy ({', '.join(noisy)}): a quiet machine or more --rounds help")
    return warnings


def _note_placement(contestants: Sequence[Contestant]) -> None:
    for one in contestants:
        if len(one.placement) > 1:
            parts = ", ".join(f"{nodes} on {provider}" for provider, nodes in one.placement.items())
            report.note(f"note: the nodes of `{one.label}` run on several providers: {parts}")
