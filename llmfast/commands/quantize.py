"""`llmfast quantize`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfast import registry, report
from llmfast.commands._options import (
    CalibrationField,
    DataSamples,
    DryRun,
    Format,
    MaxDrop,
    NumSamples,
    Overwrite,
    SampleSeed,
    SeqLen,
    check_format,
    given,
    list_plugins,
    parse_settings,
    parse_size,
)
from llmfast.errors import OptionError

if TYPE_CHECKING:
    from llmfast.bundle import ModelBundle
    from llmfast.quantize.options import QuantizeOptions

SUMMARY = "A float model to a smaller one."


def quantize(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Bundle, directory with model.onnx, or .onnx file.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the new bundle.")] = None,
    scheme: Annotated[
        str | None, typer.Option(help=f"Number format: {', '.join(registry.names('quantize.schemes'))}.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Scales of 8-bit activations: dynamic, per token; or static, calibrated.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help=f"How the numbers are found: any of {', '.join(registry.names('quantize.transforms'))}, "
            f"then one of {', '.join(registry.names('quantize.rounding'))}.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the scheme or method; see --list.")
    ] = None,
    include: Annotated[str | None, typer.Option(help="Quantize only layers whose name matches this regex.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Keep layers whose name matches this regex as floats.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text or JSON lines for methods that calibrate, by default a set that llmfast ships; for whisper a "
            "folder of .wav files, or a list of them."
        ),
    ] = None,
    calibration_field: CalibrationField = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    seed: SampleSeed = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Budget: stored bits per weight; chooses each layer's bits and blocks.")
    ] = None,
    target_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Budget: of all weights, e.g. 100MB.")] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What each layer costs, from an earlier bundle with a budget.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text, or recordings, to compare with the float model on.")] = None,
    data_samples: DataSamples = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Compare with the float model.")] = True,
    max_kld: Annotated[
        float | None,
        typer.Option(help="Gate: KL divergence in nats; without --scheme the budget (embeddings: 1 - cosine)."),
    ] = None,
    max_drop: MaxDrop = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Try what suits this machine, and keep the fastest that passes the gates.")
    ] = False,
    min_speedup: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=X", help="Gate of --auto: at least X times the float model's speed."),
    ] = None,
    provider: Annotated[str | None, typer.Option(help="Execution provider that --auto measures on.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that --auto measures with.")] = None,
    prefill: Annotated[
        str | None,
        typer.Option(metavar="SCHEME", help="Number format of a second graph that reads prompts; int8 is the fastest."),
    ] = None,
    prefill_method: Annotated[
        str | None, typer.Option(metavar="A,B", help="How that graph's numbers are found; int8: smoothquant.")
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Store the KV cache as int8, calibrated. Decoders with GroupQueryAttention only: llmfast's.",
        ),
    ] = None,
    trim_vocabulary: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="First leave out the tokens that this text does not need. Decoders and encoders that llmfast exported "
            "only, without a head over the vocabulary if encoders.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    show_list: Annotated[bool, typer.Option("--list", help="List schemes and methods with their options.")] = False,
    output_format: Format = "table",
) -> None:
    """Quantize a float model; the output says how far its weights and its answers moved.

    With a budget instead of a scheme each layer gets the bits and blocks that serve the answers most.
    Exits with 7 when a gate or a budget is missed.

    Example: llmfast quantize fp32 -o int4 --scheme int4 --set block_size=64 --max-kld 0.1
    """
    check_format(output_format)
    if show_list:
        list_plugins(output_format, "quantize.schemes", "quantize.transforms", "quantize.rounding")
        return
    budget = {"max_bits": target_bits, "max_bytes": None if target_size is None else parse_size(target_size)}
    if scheme is None and max_kld is not None and not given(budget) and not auto:
        budget["max_kld"] = max_kld
    if model is None or output is None or (scheme is None and not given(budget) and not auto):
        format_missing = scheme is None and not given(budget) and not auto
        parts = {"a MODEL": model is None, "--output": output is None, "--scheme, a budget or --auto": format_missing}
        missing = ", and ".join(name for name, is_missing in parts.items() if is_missing)
        raise OptionError(f"quantize needs {missing}", "llmfast quantize fp32 -o int4 --scheme int4")
    _check_auto(
        auto,
        excluded={"--scheme": scheme, "--method": method, "--activations": activations}
        | {"--target-bits": target_bits, "--target-size": target_size, "--prefill": prefill},
        needs={"--min-speedup": min_speedup, "--provider": provider, "--threads": threads},
        others={"--no-measure": not measure, "--resume": resume, "--dry-run": dry_run, "--set": settings},
    )
    from llmfast.quantize.budget import Budget
    from llmfast.quantize.calibrate import Calibration
    from llmfast.quantize.measure import HIGHER_IS_BETTER
    from llmfast.quantize.options import MIXED_SCHEME, QuantizeOptions
    from llmfast.quantize.stage import plan_layers
    from llmfast.quantize.stage import quantize as run
    from llmfast.quantize.summary import LAYER_COLUMNS
    from llmfast.verdict import Gate, parse_drop

    # A budget keeps its own limit, in whatever the model's answers are compared by.
    gates = [Gate("kld", max_kld, "max")] if max_kld is not None and "max_kld" not in budget else []
    gates += [parse_drop(text, HIGHER_IS_BETTER) for text in max_drop or []]
    samples = {"path": calibration, "field": calibration_field, "seed": seed}
    options = QuantizeOptions(
        scheme=scheme or MIXED_SCHEME,
        settings=_settings(settings or [], scheme or MIXED_SCHEME, activations),
        calibration=Calibration(**given({**samples, "num_samples": num_samples, "seq_len": seq_len})),
        budget=Budget(**given(budget)) if given(budget) else None,
        sensitivity=sensitivity,
        measure=measure,
        data=data,
        gates=tuple(gates),
        kv=kv,
        trim_vocabulary=trim_vocabulary,
        resume=resume,
        overwrite=overwrite,
        prefill=prefill,
        **given(
            {
                "method": method,
                "prefill_method": prefill_method,
                "include": include,
                "exclude": exclude,
                "data_samples": data_samples,
            }
        ),
    )
    if dry_run:
        if options.budget:
            report.note("note: with a budget, bits are chosen once it is measured what each layer costs")
        report.print_rows(plan_layers(model, output, options), LAYER_COLUMNS, output_format)
        return
    if auto:
        bench = {"provider": provider, "threads": threads}
        _quantize_best(model, output, options, bench, min_speedup or [], output_format)
        return
    _print(run(model, output, options), model, output_format)


def _settings(typed: list[str], scheme: str, activations: str | None) -> dict[str, str]:
    """Return the settings of --set, and --activations as one more.

    Raises:
        OptionError: the scheme has no such option, or --set says another value.
    """
    settings = parse_settings(typed)
    if activations is None:
        return settings
    folder, option = "quantize.schemes", "activations"
    fitting = [name for name in registry.names(folder) if registry.has_option(registry.load(folder, name), option)]
    if scheme in registry.names(folder) and scheme not in fitting:
        raise OptionError(f"--{option}: `{scheme}` has no such option", f"schemes that have it: {', '.join(fitting)}")
    for key in (option, f"{scheme}.{option}"):
        if settings.pop(key, activations) != activations:
            raise OptionError(f"--{option} {activations} contradicts --set {key}", "leave one of the two out")
    return settings | {option: activations}


def _check_auto(auto: bool, excluded: dict[str, Any], needs: dict[str, Any], others: dict[str, Any]) -> None:
    """Refuse options that --auto has no use for, and those that are its own without it."""
    unfit = {**excluded, **others} if auto else needs
    for name, value in unfit.items():
        if value and auto:
            raise OptionError(f"{name} does not go with --auto", "leave one of the two out")
        if value:
            hint = f"quantize times nothing else; `llmfast bench MODEL OUTPUT {name} ...` times what it made"
            raise OptionError(f"{name} needs --auto", hint)


def _quantize_best(
    model: Path,
    output: Path,
    options: "QuantizeOptions",
    bench: dict[str, Any],
    min_speedup: list[str],
    output_format: str,
) -> None:
    from dataclasses import replace

    from llmfast.auto import COLUMNS, AutoOptions, quantize_best
    from llmfast.verdict import parse_speedup

    auto = AutoOptions(options, (*options.gates, *map(parse_speedup, min_speedup)))
    auto = replace(auto, bench=replace(auto.bench, **given(bench)))

    def show(rows: list[dict[str, Any]]) -> None:
        report.print_rows(rows, [one for one in COLUMNS if any(one.key in row for row in rows)], output_format)

    quantize_best(model, output, auto, show)


def _print(bundle: "ModelBundle", model: Path, output_format: str) -> None:
    from llmfast.bundle import UNKNOWN_TASK
    from llmfast.quantize.summary import LAYER_COLUMNS, figure_columns, graph_columns, spell_worst

    measured = bundle.manifest.measured["quantize"]
    sizes = {"size_bytes": bundle.size_bytes, "bits_per_weight": bundle.manifest.bits_per_weight}
    if output_format == "json":
        report.out(report.to_json({"bundle": str(bundle.path), **sizes, **measured}))
        return
    report.print_rows(measured["layers"], LAYER_COLUMNS, output_format)
    if output_format != "csv":  # which holds one table
        report.print_rows([{**sizes, **measured}], figure_columns({**sizes, **measured}), output_format)
        if graphs := measured.get("graphs"):
            report.print_rows(graphs, graph_columns(graphs), output_format)
    report.note(spell_worst(measured["worst_layers"]))
    for form in measured["slow_forms"]:
        report.note(f"note: slow form: {form}")
    task = bundle.manifest.task
    takes_data = task != UNKNOWN_TASK and not hasattr(registry.load("tasks", task), "INPUT")
    # Predictions over a trimmed vocabulary compare with no other's.
    is_trimmed = any(step.stage == "trim" for step in bundle.manifest.lineage)
    data = " --data FILE" if takes_data and not is_trimmed else ""
    report.note(f"Next: llmfast bench {shlex.quote(str(model))} {shlex.quote(str(bundle.path))}{data}")
