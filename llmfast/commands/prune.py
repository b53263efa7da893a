"""`llmfast prune`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
)
from llmfast.errors import OptionError

if TYPE_CHECKING:
    from llmfast.prune.result import Pruned

SUMMARY = "A checkpoint with fewer blocks, channels or heads."
_STRUCTURED, _MASKS = registry.names("prune.structured"), registry.names("prune.masks")


def prune(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="Hugging Face folder or hub id; for masks a bundle or .onnx file."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the new checkpoint, or bundle.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help=f"Of a checkpoint any of {', '.join(_STRUCTURED)}; of an ONNX model one of {', '.join(_MASKS)}.",
        ),
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(metavar="R", help="Share that goes, e.g. 0.25, or layers=0.1,ffn=0.3.")
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(metavar="N", help="In place of --ratio: parameters to have at most, 100M or 75%.")
    ] = None,
    target_speedup: Annotated[
        str | None,
        typer.Option(
            metavar="X", help="In place of --ratio: how much faster, e.g. 1.3x; exports and times candidates."
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="uniform; or sensitivity: by what is lost, each layer's share of a mask, each method's of a target."
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="Masks: leave N of each M weights in a row, e.g. 2:4.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of a method; see --list.")
    ] = None,
    include: Annotated[str | None, typer.Option(help="Masks: only layers whose name matches this regex.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Masks: leave layers whose name matches this regex.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text or JSON lines that methods measure on; the default is a set that llmfast ships."),
    ] = None,
    calibration_field: CalibrationField = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    seed: SampleSeed = None,
    data: Annotated[Path | None, typer.Option(help="Text to compare with the original on.")] = None,
    data_samples: DataSamples = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Compare with the original.")] = True,
    measure_speed: Annotated[
        bool, typer.Option("--measure-speed", help="Export a checkpoint before and after, and time both.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads that it is timed with.")] = None,
    max_kld: Annotated[float | None, typer.Option(help="Gate: KL divergence from the original, in nats.")] = None,
    max_perplexity_ratio: Annotated[float | None, typer.Option(help="Gate: perplexity against the original's.")] = None,
    max_drop: MaxDrop = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    show_list: Annotated[bool, typer.Option("--list", help="List methods with their options.")] = False,
    output_format: Format = "table",
) -> None:
    """Take blocks, channels, heads, width or tokens out of a checkpoint, or put zeros into an ONNX model.

    A pruned checkpoint is a plain one: transformers, tune and export load it. It is faster, and mostly needs repair.
    Zeros give no speed-up on ONNX Runtime. Exits with 7 when a gate is missed.

    Example: llmfast prune ./SmolLM2-135M-Instruct -o pruned --method layers,ffn --target-params 75%
    """
    check_format(output_format)
    if show_list:
        list_plugins(output_format, "prune.structured", "prune.masks")
        return
    if source is None or output is None or method is None:
        raise OptionError(
            "prune needs a SOURCE, --output and --method",
            "llmfast prune CHECKPOINT -o pruned --method ffn --ratio 0.25",
        )
    targets = {"--ratio": ratio, "--target-params": target_params, "--target-speedup": target_speedup}
    if len(given(targets)) > 1:
        raise OptionError(f"{' and '.join(given(targets))} contradict each other", "choose one")
    from llmfast.prune.options import Pattern, PruneOptions, parse_factor, parse_params, parse_ratio
    from llmfast.prune.stage import plan
    from llmfast.prune.stage import prune as run
    from llmfast.prune.summary import LAYER_COLUMNS, PLAN_COLUMNS
    from llmfast.quantize.calibrate import Calibration
    from llmfast.quantize.measure import HIGHER_IS_BETTER
    from llmfast.verdict import Gate, parse_drop

    limits = given({"kld": max_kld, "perplexity_ratio": max_perplexity_ratio})
    gates = [Gate(key, limit, "max") for key, limit in limits.items()]
    gates += [parse_drop(text, HIGHER_IS_BETTER) for text in max_drop or []]
    samples = {"path": calibration, "field": calibration_field, "seed": seed}
    options = PruneOptions(
        method=method,
        ratios=parse_ratio(ratio) if ratio is not None else {},
        target_params=None if target_params is None else parse_params(target_params),
        pattern=None if pattern is None else Pattern.parse(pattern),
        settings=parse_settings(settings or []),
        calibration=Calibration(**given({**samples, "num_samples": num_samples, "seq_len": seq_len})),
        measure=measure,
        measure_speed=measure_speed,
        data=data,
        threads=threads,
        gates=tuple(gates),
        overwrite=overwrite,
        **given({"allocation": allocation, "include": include, "exclude": exclude, "data_samples": data_samples}),
    )
    if target_speedup is not None:
        factor = parse_factor(target_speedup)
        if dry_run:
            raise OptionError("--target-speedup is found by measuring, which --dry-run does not", "leave one out")
        from llmfast.prune.speedup import prune_to_speed

        _print(prune_to_speed(source, output, options, factor), output_format)
    elif dry_run:
        rows = plan(source, output, options)
        columns = PLAN_COLUMNS if "method" in rows[0] else LAYER_COLUMNS[:-1]
        report.print_rows(rows, columns, output_format)
    else:
        _print(run(source, output, options), output_format)


def _print(pruned: "Pruned", output_format: str) -> None:
    from llmfast.prune.summary import LAYER_COLUMNS, NO_SPEEDUP, columns_of

    rows = [pruned.before, pruned.after]
    if output_format == "json":
        report.out(report.to_json({"output": str(pruned.path), **pruned.document()}))
        return
    if pruned.layers is not None and output_format != "csv":  # which holds one table
        report.print_rows(pruned.layers, LAYER_COLUMNS, output_format)
    report.print_rows(rows, columns_of(rows), output_format)
    if pruned.layers is not None:
        report.note(NO_SPEEDUP)
    else:
        report.note(f"Next: llmfast export {shlex.quote(str(pruned.path))} -o fp32")
