"""`llmfast bench`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmfast import registry, report
from llmfast.commands._options import (
    AllowFallback,
    Format,
    NoTuned,
    Verify,
    check_engine,
    check_format,
    check_threads,
    given,
    parse_size,
)
from llmfast.errors import LlmfastError, NativeCrashError, OptionError

# Options of a run that --tune-session looks at too.
_TUNING = ("prompt_tokens", "output_tokens", "rounds", "precision", "provider", "seed")

SUMMARY = "Speed, cost, quality and energy side by side; gates."


def bench(
    models: Annotated[
        list[Path] | None, typer.Argument(metavar="MODEL", help="Bundles to measure; documents with --compare.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="Bundle to compare with; the default is the first.")] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option("--prompt-tokens", "-p", help="Tokens of the input: 512, or a sweep: 128,512 or 128-512+128."),
    ] = None,
    output_tokens: Annotated[int | None, typer.Option("--output-tokens", "-n", help="Tokens decoded.")] = None,
    batch: Annotated[str | None, typer.Option("--batch", "-b", help="Sequences at once, or a sweep: 1,4,8.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Batch x tokens in place of both, e.g. 1x16,8x128.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Interleaved rounds per bundle; the default is 8 and more until speeds are sure.")
    ] = None,
    max_time: Annotated[float | None, typer.Option(help="Seconds of rounds, at most; --rounds are the fewest.")] = None,
    precision: Annotated[
        float | None, typer.Option(help="Half an interval that is narrow enough; smaller differences are none.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Rounds before them that are not counted.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text, JSONL, CSV or TSV for quality; what of depends on the task, see docs/bench.md."),
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Windows of text scored.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    context_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a window that are given, not scored; llama-perplexity: 257 of 512.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, a comma list of names, groups or patterns: hellaswag,arc_easy."),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Folder of own lm-eval tasks, YAML; functions that they name are run.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task, at most.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; the default is the task's.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the data of tasks from the Hugging Face hub where it is missing.")
    ] = False,
    false_negative_cost: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL=X", help="Of a classifier: missing a LABEL costs X false alarms; sets the threshold."
        ),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(help=f"Execution provider, or a list: {', '.join(registry.names('providers'))}; default: cpu."),
    ] = None,
    allow_fallback: AllowFallback = False,
    threads: Annotated[
        str | None, typer.Option(help="Threads, or a sweep: 1,2; the default is the cores this process may use.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune-session", help="Search threads, spinning, blocks and chunks of one decoder; keep the fastest."
        ),
    ] = False,
    no_tuned: NoTuned = False,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of the machine: gives prices per million tokens.")
    ] = None,
    watts_per_core: Annotated[float | None, typer.Option(help="Estimates energy where no counter can be read.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Time by operator and layer role as well.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the random prompts.")] = None,
    max_kld: Annotated[float | None, typer.Option(help="Gate: KL divergence from the baseline, in nats.")] = None,
    max_perplexity_ratio: Annotated[float | None, typer.Option(help="Gate: perplexity against the baseline's.")] = None,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=X", help="Gate: worse than the baseline by X at most; shares in points."),
    ] = None,
    max_false_negative_rate: Annotated[
        float | None, typer.Option(help="Gate: per cent of that label's cases that are missed.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Gate: size, in MB or like 1.5GB.")] = None,
    max_rss: Annotated[str | None, typer.Option(help="Gate: peak memory, in MB or like 1.5GB.")] = None,
    max_energy: Annotated[float | None, typer.Option(help="Gate: joules per token.")] = None,
    min_speedup: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=X", help="Gate: at least X times the baseline's speed; may be repeated."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: each node of a cluster measures a share, beside the baseline.")
    ] = "local",
    address: Annotated[str | None, typer.Option(help="Ray cluster to use; the default is RAY_ADDRESS.")] = None,
    workers: Annotated[int | None, typer.Option(help="Nodes of it that take part, at most.")] = None,
    verify: Verify = False,
    inconclusive: Annotated[
        str, typer.Option(help="Whether gates pass or fail whose interval includes the limit.")
    ] = "fail",
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare two documents, OLD.json NEW.json; nothing is run.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write the JSON document to a file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the gates as JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report that opens in a browser, offline.")] = None,
    output_format: Format = "table",
) -> None:
    """Measure speed, cost, quality and energy of bundles side by side, each against the baseline.

    Exits with 7 when a gate is missed or inconclusive, with 9 when a bundle crashed.

    Example: llmfast bench fp32 int4 --data text.txt --max-kld 0.3 --min-speedup decode_tokens_per_s=2
    """
    check_format(output_format)
    from llmfast.bench.junit import write_junit
    from llmfast.tuned import ignoring_tuned
    from llmfast.verdict import Gate, enforce, parse_speedup

    for file in (save, junit, html):
        _check_folder(file)
    if html is not None:
        from llmfast.bench.webpage.page import check_plotly

        if compare:
            raise OptionError("--html shows a run, not a comparison", "give it to the run")
        check_plotly()
    if inconclusive not in ("pass", "fail"):
        raise OptionError(f"--inconclusive `{inconclusive}`: unknown", "choose from: pass, fail")
    limits = {
        "kld": max_kld,
        "perplexity_ratio": max_perplexity_ratio,
        "false_negative_rate": None if max_false_negative_rate is None else max_false_negative_rate / 100,
        "size_bytes": _bytes("--max-size", max_size),
        "peak_rss_bytes": _bytes("--max-rss", max_rss),
        "joules_per_token": max_energy,
    }
    gates = [Gate(figure, limit, "max") for figure, limit in limits.items() if limit is not None]
    gates += [parse_speedup(text) for text in min_speedup or []]
    judging = {"gates": tuple(gates), "max_drops": tuple(max_drop or []), "inconclusive": inconclusive}
    cluster = given({"address": address, "workers": workers})
    check_engine(engine, cluster)
    if engine == "ray" and (compare or tune):
        raise OptionError(f"--engine ray does not go with {'--compare' if compare else '--tune-session'}")
    settings = {
        "prompt_tokens": _numbers("--prompt-tokens", prompt_tokens),
        "output_tokens": output_tokens,
        "batch": _numbers("--batch", batch),
        "shapes": shapes,
        "rounds": rounds,
        "max_time": max_time,
        "precision": precision,
        "warmup": warmup,
        "data": data,
        "num_samples": num_samples,
        "seq_len": seq_len,
        "context_tokens": context_tokens,
        "false_negative_cost": false_negative_cost,
        "tasks": _names(tasks),
        "tasks_dir": tasks_dir,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "download": download,
        "provider": provider,
        "allow_fallback": allow_fallback,
        "threads": _threads(threads),
        "price_per_hour": price_per_hour,
        "watts_per_core": watts_per_core,
        "profile": profile,
        "seed": seed,
    }
    idle = given(settings | {"baseline": baseline})
    if compare:
        idle |= {"verify": verify, "no_tuned": no_tuned, "tune_session": tune}
        _refuse_idle("--compare", idle, "it takes gates, --inconclusive, --save and --junit")
        document, show = _compare(models or [], judging)
    else:
        if tune:
            _check_tuning(idle | given({"save": save, "junit": junit, "html": html}), judging)
        if verify:
            _verify([*(models or []), *([baseline] if baseline else [])])
        if tune:
            _tune(models or [], settings, output_format)
            return
        with ignoring_tuned(no_tuned):
            on = cluster if engine == "ray" else None
            document, show = _run(models or [], settings | judging, baseline, on)
    if save is not None:
        from llmfast.bench.document import save_document

        save_document(document, save)
    if junit is not None:
        write_junit(document, junit)
    if html is not None:
        from llmfast.bench.webpage.page import write_html

        write_html(document, html)
    try:
        show(document, output_format)
    finally:  # a reader that left does not undo the verdict
        _raise_failures(document)
        enforce(document["verdict"])


def _run(
    models: list[Path], settings: dict[str, Any], baseline: Path | None, cluster: dict[str, Any] | None
) -> tuple[Mapping[str, Any], Any]:
    from llmfast.bench.options import BenchOptions
    from llmfast.bench.stage import bench as run
    from llmfast.bench.table import print_document

    options = BenchOptions(**given(settings))
    if cluster is None:
        return run(models, options, baseline).document(), print_document
    from llmfast.bench.cluster import bench_on_cluster

    return bench_on_cluster(models, options, baseline, **cluster).document(), print_document


def _check_tuning(settings: dict[str, Any], judging: dict[str, Any]) -> None:
    """Refuse options that a search for session settings has no use for."""
    idle = {name: value for name, value in settings.items() if name not in _TUNING}
    idle |= {name: judging[name] or None for name in ("gates", "max_drops")}
    _refuse_idle("--tune-session", idle, f"it takes {_spell_flags(_TUNING)}")
    if len(settings.get("prompt_tokens", ())) > 1:
        raise OptionError("--tune-session takes one length of prompts", "e.g. -p 512")


def _refuse_idle(mode: str, idle: Mapping[str, Any], hint: str) -> None:
    """Refuse options that are given, and that a mode has no use for."""
    if names := [name for name, value in idle.items() if value is not None and value is not False]:
        raise OptionError(f"{mode} has no use for {_spell_flags(names)}", hint)


def _spell_flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _tune(models: list[Path], settings: dict[str, Any], output_format: str) -> None:
    from llmfast.bench.options import BenchOptions
    from llmfast.bench.tuning import print_tuning, tune_session

    chosen = {name: value for name, value in given(settings).items() if name in _TUNING}
    print_tuning(tune_session(models, BenchOptions(**chosen)), output_format)


def _verify(models: list[Path]) -> None:
    from llmfast.verify import verify_hashes

    for model in models:
        verify_hashes(model)


def _compare(documents: list[Path], judging: dict[str, Any]) -> tuple[Mapping[str, Any], Any]:
    from llmfast.bench.comparison import compare_documents, print_comparison
    from llmfast.bench.document import load_document

    if len(documents) != 2:
        raise OptionError(f"--compare takes two documents, not {len(documents)}", "llmfast bench --compare OLD NEW")
    old, new = documents
    comparison = compare_documents(load_document(old), load_document(new), (old.name, new.name), **judging)
    for warning in comparison["warnings"]:
        report.note(f"note: {warning}")
    return comparison, print_comparison


def _raise_failures(document: Mapping[str, Any]) -> None:
    """Raise the failures of bundles as one error; the gravest one's exit code is that of a crash."""
    errors = [row["error"] for row in document["rows"] if "error" in row]
    if not errors:
        return
    first = next((error for error in errors if error["kind"] == NativeCrashError.__name__), errors[0])
    failure = LlmfastError("; ".join(error["message"] for error in errors), first["hint"])
    failure.exit_code = first["exit_code"]
    raise failure


def _numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    from llmfast.bench.options import parse_numbers

    return None if text is None else parse_numbers(text, flag)


def _threads(text: str | None) -> tuple[int, ...] | None:
    counts = _numbers("--threads", text)
    check_threads(max(counts) if counts else None)
    return counts


def _names(text: str | None) -> tuple[str, ...] | None:
    """Return the names of a comma list.

    Raises:
        OptionError: there is none.
    """
    if text is None:
        return None
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    if not names:
        raise OptionError("--tasks: no task is named", "for example --tasks hellaswag,arc_easy")
    return names


def _bytes(flag: str, text: str | None) -> float | None:
    """Return the bytes of a size in MB, or with a unit of its own."""
    if text is None:
        return None
    try:
        return float(text) * 1e6
    except ValueError:
        pass
    try:
        return parse_size(text)
    except OptionError as error:
        raise OptionError(f"{flag}: {error.message}", error.hint) from error


def _check_folder(file: Path | None) -> None:
    """Refuse a file that can't be written before anything is measured for it."""
    if file is not None and not file.resolve().parent.is_dir():
        raise OptionError(f"no such folder: `{file.parent}`", "make it first, or choose another place")
