"""The command line: parse, make one library call, print. Stages are imported inside the commands."""

import io
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmfast import __version__, registry, report
from llmfast.bundle import TEXT_GENERATION, UNKNOWN_TASK
from llmfast.errors import LlmfastError, OptionError, ResourceError

_HELP = {"help_option_names": ["-h", "--help"]}


class _Group(TyperGroup):
    """Turns failures into messages and exit codes, for the shell and for a test's runner alike."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LlmfastError as error:
            report.note(f"error: {report.printable(error.message)}")
            if error.hint:
                report.note(f"\nhint: {report.printable(error.hint)}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            report.note("interrupted")
            raise typer.Exit(128 + signal.SIGINT) from None
        except BrokenPipeError:
            sys.stdout = None  # the reader left; there is nobody to tell
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=_Group,
    name="llmfast",
    context_settings=_HELP,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory of the new bundle.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the input and print the plan; write nothing.")]
Provider = Annotated[str, typer.Option(help=f"Execution provider: {', '.join(registry.names('providers'))}.")]
Threads = Annotated[int | None, typer.Option(help="Threads; the default is the cores this process may use.")]
Format = Annotated[str, typer.Option("--format", help=f"How results are printed: {', '.join(report.FORMATS)}.")]


def main() -> None:
    """Run the command line; the exit codes are those of README.md."""
    _mend_streams()
    for name in ("SIGTERM", "SIGHUP"):
        # `nohup` ignores SIGHUP, and means it.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), _terminate)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:  # what stages do not expect: the results' own file is full
        report.note(f"error: cannot go on: {error.strerror or error}")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or Python would try to flush the full one at its end
        sys.exit(ResourceError.exit_code)


def _mend_streams() -> None:
    """Let a program whose streams were closed, or can't spell every character, run as any other."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _terminate(number: int, _: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # unwinds the stack, so that staged output is removed


def _print_version(wanted: bool) -> None:
    if wanted:
        report.out(f"llmfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make Transformers small and fast on ONNX Runtime, with proof.

    llmfast export CHECKPOINT -o fp32, then llmfast quantize fp32 -o int4 --scheme int4,
    then llmfast bench fp32 int4 --data text.txt, then llmfast infer int4 --prompt "Hello".
    """


@app.command(short_help="A PyTorch checkpoint to an fp32 bundle, proven equal.")
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


@app.command(short_help="A float model to a smaller one.")
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
    _check_format(output_format)
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
        settings=_parse_settings(settings or []),
        calibration=Calibration(calibration, **_given({"num_samples": num_samples, "seq_len": seq_len}))
        if calibration
        else None,
        overwrite=overwrite,
        **_given({"method": method, "include": include, "exclude": exclude}),
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


@app.command(short_help="Speed, memory, size and quality side by side; gates.")
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Bundles to measure.")],
    baseline: Annotated[Path | None, typer.Option(help="Bundle to compare with; the default is the first.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option("--prompt-tokens", "-p", help="Tokens of the prompt.")] = None,
    output_tokens: Annotated[int | None, typer.Option("--output-tokens", "-n", help="Tokens decoded.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Encoders: batch x length, e.g. 1x16,8x128.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds per bundle.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Rounds before them that are not counted.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text for quality; TSV of scored pairs for embeddings; `label text` for classifiers."),
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Windows of text scored.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random prompts.")] = None,
    max_kld: Annotated[float | None, typer.Option(help="Gate: KL divergence from the baseline, in nats.")] = None,
    max_perplexity_ratio: Annotated[float | None, typer.Option(help="Gate: perplexity against the baseline's.")] = None,
    max_size: Annotated[float | None, typer.Option(help="Gate: size in MB.")] = None,
    min_speedup: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=X", help="Gate: at least X times the baseline's speed; may be repeated."),
    ] = None,
    output_format: Format = "table",
) -> None:
    """Measure speed, size and quality of bundles side by side, each against the baseline.

    Exits with 7 when a gate is missed.

    Example: llmfast bench fp32 int4 --data text.txt --max-kld 0.3 --min-speedup decode_tokens_per_s=2
    """
    _check_format(output_format)
    from llmfast.bench.options import BenchOptions
    from llmfast.bench.stage import bench as run
    from llmfast.bench.table import print_document
    from llmfast.bench.verdict import Gate, enforce, parse_speedup

    limits = {
        "kld": max_kld,
        "perplexity_ratio": max_perplexity_ratio,
        "size_bytes": None if max_size is None else max_size * 1e6,
    }
    gates = [Gate(figure, limit, "max") for figure, limit in limits.items() if limit is not None]
    gates += [parse_speedup(text) for text in min_speedup or []]

    given = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "shapes": shapes,
        "rounds": rounds,
        "warmup": warmup,
        "data": data,
        "num_samples": num_samples,
        "seq_len": seq_len,
        "provider": provider,
        "threads": threads,
        "seed": seed,
    }
    document = run(models, BenchOptions(gates=tuple(gates), **_given(given)), baseline)
    try:
        print_document(document, output_format)
    finally:  # a reader that left does not undo the verdict
        enforce(document["verdict"])


@app.command(short_help="A prompt to an answer, a text to its label or vector.")
def infer(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Bundle to run.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to answer, classify or embed; - reads stdin.")],
    system: Annotated[str | None, typer.Option(help="What a chat model is told first.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt, without the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Randomness; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that make up p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages tokens seen before.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text that ends the answer; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    output_format: Annotated[str, typer.Option("--format", help="text, or json for one document.")] = "text",
) -> None:
    """Answer a prompt, or classify or embed a text, according to the bundle's task.

    Example: llmfast infer int4 --prompt "What is the capital of France?"
    """
    if output_format not in ("text", "json"):
        raise OptionError(f"unknown format `{output_format}`", "choose from: text, json")
    from dataclasses import asdict

    from llmfast.bundle import ModelBundle
    from llmfast.infer import stage
    from llmfast.infer.sampling import Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    knobs = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    task = ModelBundle.open(model).manifest.task
    if task not in (TEXT_GENERATION, UNKNOWN_TASK):
        unfit = {**knobs, "system": system, "raw": raw or None, "max_tokens": max_tokens, "stop": stop}
        for name in _given(unfit):
            raise OptionError(f"--{name.replace('_', '-')} is for text generation, `{model}` is for {task}")
        (answer,) = stage.answer(model, [text], provider=provider, threads=threads)
        report.out(report.to_json(answer) if output_format == "json" else stage.spell_answer(answer))
        return
    generation = stage.infer(
        model,
        text,
        emit=report.write if output_format == "text" else lambda piece: None,
        system=system,
        raw=raw,
        sampling=Sampling(**_given(knobs)),
        stop=stop or (),
        provider=provider,
        threads=threads,
        **_given({"max_tokens": max_tokens}),
    )
    report.out(report.to_json(asdict(generation)) if output_format == "json" else "")
    report.note(stage.spell_speed(generation))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the user did not say, so that each default stands in one place, the library."""
    return {key: value for key, value in values.items() if value is not None}


def _check_format(name: str) -> None:
    if name not in report.FORMATS:
        raise OptionError(f"unknown format `{name}`", f"choose from: {', '.join(report.FORMATS)}")


def _parse_settings(settings: list[str]) -> dict[str, str]:
    pairs = [setting.partition("=") for setting in settings]
    for key, separator, _ in pairs:
        if not key or not separator:
            raise OptionError(f"--set `{key}`: not KEY=VALUE", "for example --set block_size=64")
    return {key: value for key, _, value in pairs}
