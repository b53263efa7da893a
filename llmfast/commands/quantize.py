"""`llmfast quantize`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from llmfast import registry, report
from llmfast.commands._options import DryRun, Format, Overwrite, check_format, given, parse_settings
from llmfast.errors import OptionError

SUMMARY = "A float model to a smaller one."


def quantize(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Bundle, directory with model.onnx, or .onnx file.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the new bundle.")] = None,
    scheme: Annotated[
        str | None, typer.Option(help=f"Number format: {', '.join(registry.names('quantize.schemes'))}.")
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
    calibration: Annotated[Path | None, typer.Option(help="Text for methods that calibrate, gptq for one.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Windows, or an encoder's lines, of it to use.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    show_list: Annotated[bool, typer.Option("--list", help="List schemes and methods with their options.")] = False,
    output_format: Format = "table",
) -> None:
    """Quantize a float model; the output says how far its weights moved.

    Example: llmfast quantize fp32 -o int4 --scheme int4 --set block_size=64
    """
    check_format(output_format)
    if show_list:
        report.out(registry.describe("quantize.schemes", "quantize.transforms", "quantize.rounding"))
        return
    if model is None or output is None or scheme is None:
        raise OptionError(
            "quantize needs a MODEL, --output and --scheme", "llmfast quantize fp32 -o int4 --scheme int4"
        )
    from llmfast.quantize.calibrate import Calibration
    from llmfast.quantize.stage import LAYER_COLUMNS, QuantizeOptions, plan_layers
    from llmfast.quantize.stage import quantize as run

    options = QuantizeOptions(
        scheme=scheme,
        settings=parse_settings(settings or []),
        calibration=Calibration(calibration, **given({"num_samples": num_samples, "seq_len": seq_len}))
        if calibration
        else None,
        overwrite=overwrite,
        **given({"method": method, "include": include, "exclude": exclude}),
    )
    if dry_run:
        report.print_rows(plan_layers(model, output, options), LAYER_COLUMNS, output_format)
        return
    bundle = run(model, output, options)
    report.print_rows(bundle.manifest.measured["quantize"]["layers"], LAYER_COLUMNS, output_format)
    report.note(
        f"{output}: {bundle.size_bytes / 1e6:.1f} MB, {bundle.manifest.bits_per_weight:.2f} bits per weight. "
        f"Next: llmfast bench {shlex.quote(str(model))} {shlex.quote(str(output))} --data FILE"
    )
