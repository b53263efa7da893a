"""`llmfast tune`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmfast import registry, report
from llmfast.commands._options import (
    DryRun,
    Format,
    Overwrite,
    Threads,
    check_format,
    given,
    list_plugins,
    parse_settings,
)
from llmfast.errors import OptionError

if TYPE_CHECKING:
    from llmfast.tune.stage import Tuned

_SPELLED = {"epoch": "{:g}".format}
SUMMARY = "A checkpoint trained on data of yours, or repaired after pruning."


def tune(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Hugging Face folder or hub id.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the new checkpoint.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="What to train on; each objective says in what form, see --list.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="What to measure on; the default is a part of --data.")
    ] = None,
    validation_split: Annotated[float | None, typer.Option(help="That part, as a share.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help=f"What to learn: {', '.join(registry.names('tune.objectives'))}; the default is what suits the model."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the objective; see --list.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--field", metavar="COLUMN=NAME", help="Name of a column in a .csv, .tsv or .jsonl file."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Names of labels 0, 1, ...; the default is the data's or the model's."),
    ] = None,
    new_head: Annotated[bool, typer.Option("--new-head", help="Replace a classifier's head.")] = False,
    teacher: Annotated[str | None, typer.Option(metavar="CHECKPOINT", help="Learn to answer as this one does.")] = None,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="In place of CHECKPOINT: run FILE; FUNCTION() returns (module, example_inputs[, dynamic_axes]).",
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights that --module starts from, a .safetensors file.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the forward pass: fp32, bf16, fp16; the default is bf16 where the hardware multiplies it."
        ),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adam or sgd.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="The highest learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="How it falls: cosine, linear, constant.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which it rises.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Share of a layer's learning rate that the layer below it has.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices.")] = None,
    average: Annotated[
        float | None, typer.Option(metavar="DECAY", help="Keep a moving average of the weights, e.g. 0.995.")
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip longer gradients to this length; 0 does not.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps, whatever the epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step, over all passes and processes.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Passes that a step's rows are split into.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them.")
    ] = False,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train low-rank adapters, merged at the end, not the weights.")
    ] = None,
    quantize_aware: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME[:KEY=VALUE,..]", help="Train with weights rounded as quantize will: int2, int4, int8, w8."
        ),
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between validations; default: an epoch.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without progress, and keep the best weights.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of the log.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order, dropout and new weights.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the default is a GPU if there is one.")] = None,
    parallel: Annotated[
        str | None, typer.Option(help="Under torchrun: ddp, or fsdp for models larger than a card.")
    ] = None,
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    show_list: Annotated[bool, typer.Option("--list", help="List objectives with their data and options.")] = False,
    output_format: Format = "table",
) -> None:
    """Fine-tune a checkpoint in mixed precision; the output is one that export takes.

    The output holds the log of every step (training.jsonl) and its curves (curves.svg).

    Example: llmfast tune ./all-MiniLM-L6-v2 -o sentiment --data train.txt --validation dev.txt
    """
    check_format(output_format)
    if show_list:
        list_plugins(output_format, "tune.objectives")
        return
    if output is None or data is None:
        raise OptionError("tune needs a CHECKPOINT, --output and --data", "llmfast tune CHECKPOINT -o DIR --data FILE")
    from llmfast.tune.options import TuneOptions
    from llmfast.tune.stage import describe_tuning
    from llmfast.tune.stage import tune as run

    chosen = {
        "objective": objective,
        "module": module,
        "weights": weights,
        "validation": validation,
        "validation_split": validation_split,
        "labels": tuple(name.strip() for name in labels.split(",")) if labels else None,
        "teacher": teacher,
        "precision": precision,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "layer_decay": layer_decay,
        "weight_decay": weight_decay,
        "average": average,
        "max_grad_norm": max_grad_norm,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "seq_len": seq_len,
        "lora": lora,
        "quantize_aware": quantize_aware,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "save_every": save_every,
        "log_every": log_every,
        "seed": seed,
        "device": device,
        "parallel": parallel,
        "threads": threads,
    }
    options = TuneOptions(
        data=data,
        settings=parse_settings(settings or []),
        fields=parse_settings(fields or []),
        new_head=new_head,
        gradient_checkpointing=gradient_checkpointing,
        resume=resume,
        overwrite=overwrite,
        **given(chosen),
    )
    if dry_run:
        report.out(describe_tuning(checkpoint, output, options))
        return
    tuned = run(checkpoint, output, options)
    if tuned.is_main:
        _print(tuned, module, output_format)


def _print(tuned: "Tuned", module: str | None, output_format: str) -> None:
    figures = tuned.figures
    validations = figures["validations"]
    rows = validations or [{"step": figures["steps"], "loss": figures["loss"]}]
    if output_format == "json":
        report.out(report.to_json({"checkpoint": str(tuned.path), **figures}))
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [report.Column(key.replace("_", " "), key, _SPELLED.get(key, _spell)) for key in keys]
    report.print_rows(rows, columns, output_format)
    skipped = f", {figures['skipped_steps']} of them skipped" if figures["skipped_steps"] else ""
    report.note(
        f"{tuned.path}: {figures['objective']} in {figures['precision']}, {figures['steps']} steps{skipped}, "
        f"{figures['trained_parameters']:,} of {figures['parameters']:,} parameters trained; "
        f"{figures['tokens_per_s']:.0f} tokens/s, {figures['peak_memory_bytes'] / 1e9:.1f} GB"
    )
    folder = shlex.quote(str(tuned.path))
    source = f"--module {shlex.quote(module)} --weights {folder}/model.safetensors" if module else folder
    report.note(f"Next: llmfast export {source} -o {folder}-fp32")


def _spell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
