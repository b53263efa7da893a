"""Measure bundles against a baseline: speed in interleaved rounds, memory, size, quality on given data."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast import registry, report
from llmfast.bench.contestant import Contestant, line_up, note_lacks
from llmfast.bench.gating import resolve_gates
from llmfast.bench.harness.run import measure_tasks, metrics_of
from llmfast.bench.machine import describe_machine
from llmfast.bench.options import BenchOptions
from llmfast.bench.processes import Processes
from llmfast.bench.profile import profile_all
from llmfast.bench.quality import measure_quality, retokenize
from llmfast.bench.result import Benchmark, make_row
from llmfast.bench.roofline import file_rooflines
from llmfast.bench.rounds import Rounds
from llmfast.bench.statistics import coverage, relative_spread
from llmfast.bench.table import print_document
from llmfast.bench.watch import Watch
from llmfast.bench.workload import Workload, per_case, plan
from llmfast.bundle import SEQ2SEQ_TASKS, TEXT_GENERATION, UNKNOWN_TASK, ModelBundle, sha256
from llmfast.errors import InputError, OptionError
from llmfast.verdict import Gate, Judgement, judge

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
) -> Benchmark:
    """Measure bundles and compare them with the baseline.

    Every bundle runs in a process of its own. All are open at once, or where memory does not hold them each is
    opened for its turns.

    Args:
        models: bundle directories or .onnx files; or these by the names that the document shall have.
        options: what to measure, and how often.
        baseline: the bundle the others are compared with; None takes the first model.
        clock: monotonic seconds, for `max_time`.

    Returns:
        For speed a row's figures have `<name>` (median over the rounds; its interval is a 95 % bootstrap, None with
        one round) and `<name>_ratio`, whose interval knows of luck that stays with a process, see
        `statistics.launch_interval`; for quality `<name>` (over all data) and, where a figure means something alone,
        `<name>_change` against the baseline. Size, memory and loading are one observation each. A bundle that failed
        has `error` and no figures.

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
    metrics = _metrics_for(task, options)
    tasks = _load_tasks(task, contestants, options)
    of_tasks = {} if tasks is None else metrics_of(tasks)
    gates = resolve_gates(metrics | of_tasks, options, workload)
    _compare_tokenizers(task, contestants, reference, options)
    items = _prepare_data(_of_kind(metrics, "quality"), reference, replace(options, seq_len=workload.seq_len))
    machine = describe_machine() | {"threads": reference.threads}
    retokenize(contestants, metrics, items)
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
    rows = [make_row(one) for one in contestants]
    verdict = judge([row.document() for row in rows], reference.label, gates, options.inconclusive)
    settings = _settings(options, workload, counted, units, contestants) | {"tasks": asked}
    judged = [Judgement(**entry) for entry in verdict]
    return Benchmark(machine, settings, warnings, reference.label, rows, judged)


def gates_of_run(bundle: ModelBundle, options: BenchOptions) -> tuple[Gate, ...]:
    """Return the gates of a run with one bundle as its figures are called, before it is run.

    Raises:
        OptionError: a gate on what this run will not measure, or a length that the bundle does not hold.
    """
    task, context = bundle.manifest.task, bundle.manifest.architecture.get("context_length")
    return resolve_gates(_metrics_for(task, options), options, plan(task, options, [(bundle.name, context)]))


def _load_tasks(task: str, contestants: Sequence[Contestant], options: BenchOptions) -> "Tasks | None":
    """Load the tasks of lm-eval that were asked for, before anything is opened: a bad name fails at once."""
    if not options.tasks:
        return None
    if task != TEXT_GENERATION or any(one.bundle.companion("tokenizer.json") is None for one in contestants):
        raise OptionError("--tasks: lm-eval asks models that generate text and have a tokenizer", "leave it out")
    from llmfast.bench.harness.tasks import load_tasks

    return load_tasks(options)


def _metrics_for(task: str, options: BenchOptions) -> Metrics:
    """Return the metrics of a task that these options ask for, in table order.

    Raises:
        OptionError: an option of a metric that the task does not have.
    """
    plugins = {name: registry.load("bench.metrics", name) for name in registry.names("bench.metrics")}
    fitting = {name: plugin for name, plugin in plugins.items() if not plugin.TASKS or task in plugin.TASKS}
    for name, plugin in plugins.items():
        option = getattr(plugin, "OPTION", None)
        if option is None:
            continue
        if getattr(options, option) is None:
            fitting.pop(name, None)
        elif name not in fitting:
            raise OptionError(f"--{option.replace('_', '-')} is for {', '.join(plugin.TASKS)}", "leave it out")
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
    """Refuse to compare predictions over different vocabularies of one tokenizer.

    Of encoders labels, vectors and likeliest tokens are compared, whatever their vocabularies.
    """
    if task not in (TEXT_GENERATION, *SEQ2SEQ_TASKS):
        return
    for one in contestants:
        if not one.same_tokens or one.failure is not None:
            continue
        if one.vocab_size is not None and one.vocab_size != baseline.vocab_size:
            raise InputError(
                f"`{one.label}` has {one.vocab_size} token ids, `{baseline.label}` has {baseline.vocab_size}",
                "their predictions can't be compared: leave out --data, or choose another baseline",
            )


def _settings(
    options: BenchOptions, workload: Workload, rounds: int, units: dict[str, int], contestants: Sequence[Contestant]
) -> dict[str, Any]:
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
        "threads": list(dict.fromkeys(one.threads for one in contestants)),
        "provider": list(options.providers),
    }
    if options.data is not None:
        settings["data"] = {"name": options.data.name, "sha256": sha256(options.data)} | units
    return settings


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
