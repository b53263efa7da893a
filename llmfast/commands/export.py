"""`llmfast export`."""

from pathlib import Path
from typing import Annotated

import typer

from llmfast import report
from llmfast.commands._options import DryRun, Output, Overwrite, Threads
from llmfast.errors import OptionError

SUMMARY = "A PyTorch checkpoint to an fp32 bundle, proven equal."


def export(
    output: Output,
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="Hugging Face folder, .gguf file, or hub id.")
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="In place of SOURCE: run FILE; FUNCTION() returns (module, example_inputs[, dynamic_axes]).",
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights for --module, a .safetensors file.")] = None,
    task: Annotated[str | None, typer.Option(help="Task; the default is read from the checkpoint.")] = None,
    context_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Longest context of a decoder; default: the model's own."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Take weights from .bin and .pt files: tensors and nothing else."),
    ] = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Export a PyTorch checkpoint to an fp32 bundle, and prove that it computes the same.

    Example: llmfast export ./SmolLM2-135M-Instruct -o fp32

    Another decoder architecture is one new file, llmfast/export/decoders/MODEL_TYPE.py: it says where the
    architecture departs from Llama.
    """
    if (source is None) == (module is None):
        raise OptionError("export needs a SOURCE or --module, one of them", "llmfast export --module FILE.py:FUNCTION")
    if weights is not None and module is None:
        raise OptionError("--weights belongs to --module", "a SOURCE brings its weights")
    from llmfast.export import module as user_module
    from llmfast.export import stage

    options = stage.ExportOptions(task, threads, overwrite, context_length, allow_pickle)
    if dry_run:
        plan = user_module.describe_module_export(module, output, options) if module else ""
        report.out(plan or stage.describe_export(str(source), output, options))
        return
    if module:
        bundle = user_module.export_module(module, output, options, weights)
    else:
        bundle = stage.export(str(source), output, options)
    parity = bundle.manifest.measured["export"]["parity"]
    name = bundle.manifest.architecture["class"] if module and not task else bundle.manifest.task
    report.out(
        f"{output}: {name}, {bundle.size_bytes / 1e6:.1f} MB; "
        f"differs from PyTorch by at most {parity['max_abs_diff']:.2g}"
    )
