"""`llmfast export`."""

from typing import Annotated

import typer

from llmfast import report
from llmfast.commands._options import DryRun, Output, Overwrite, Threads

SUMMARY = "A PyTorch checkpoint to an fp32 bundle, proven equal."


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hugging Face folder, .gguf file, or hub id.")],
    output: Output,
    task: Annotated[str | None, typer.Option(help="Task; the default is read from the checkpoint.")] = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Export a PyTorch checkpoint to an fp32 bundle, and prove that it computes the same.

    Example: llmfast export ./SmolLM2-135M-Instruct -o fp32
    """
    from llmfast.export.stage import ExportOptions, describe_export
    from llmfast.export.stage import export as run

    options = ExportOptions(task=task, threads=threads, overwrite=overwrite)
    if dry_run:
        report.out(describe_export(source, output, options))
        return
    bundle = run(source, output, options)
    parity = bundle.manifest.measured["export"]["parity"]
    report.out(
        f"{output}: {bundle.manifest.task}, {bundle.size_bytes / 1e6:.1f} MB; "
        f"differs from PyTorch by at most {parity['max_abs_diff']:.2g}"
    )
