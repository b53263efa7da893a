"""`llmfast infer`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmfast import registry, report
from llmfast.commands._options import Provider, Threads, given
from llmfast.errors import OptionError

SUMMARY = "A prompt to an answer, a text to its label or vector."


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

    from llmfast.bundle import TEXT_GENERATION, UNKNOWN_TASK, ModelBundle
    from llmfast.infer import stage
    from llmfast.infer.sampling import SAMPLING_OPTIONS, Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    options = given(
        {
            "system": system,
            "raw": raw or None,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop,
        }
    )
    task = ModelBundle.open(model).manifest.task
    if task not in (TEXT_GENERATION, UNKNOWN_TASK):
        (answer,) = stage.answer(model, [text], provider=provider, threads=threads, **options)
        spelled: str = registry.load("tasks", task).spell(answer)
        report.out(report.to_json(answer) if output_format == "json" else spelled)
        return
    sampling = Sampling(**{key: options.pop(key) for key in SAMPLING_OPTIONS if key in options})
    generation = stage.infer(
        model,
        text,
        emit=report.write if output_format == "text" else lambda piece: None,
        sampling=sampling,
        provider=provider,
        threads=threads,
        **options,
    )
    report.out(report.to_json(asdict(generation)) if output_format == "json" else "")
    report.note(stage.spell_speed(generation))
