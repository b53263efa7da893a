"""`llmfast bench`."""

from pathlib import Path
from typing import Annotated

import typer

from llmfast.commands._options import Format, Provider, Threads, Verify, check_format, given

SUMMARY = "Speed, memory, size and quality side by side; gates."


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
    verify: Verify = False,
    output_format: Format = "table",
) -> None:
    """Measure speed, size and quality of bundles side by side, each against the baseline.

    Exits with 7 when a gate is missed.

    Example: llmfast bench fp32 int4 --data text.txt --max-kld 0.3 --min-speedup decode_tokens_per_s=2
    """
    check_format(output_format)
    from llmfast.bench.options import BenchOptions
    from llmfast.bench.stage import bench as run
    from llmfast.bench.table import print_document
    from llmfast.verdict import Gate, enforce, parse_speedup
    from llmfast.verify import verify_hashes

    limits = {
        "kld": max_kld,
        "perplexity_ratio": max_perplexity_ratio,
        "size_bytes": None if max_size is None else max_size * 1e6,
    }
    gates = [Gate(figure, limit, "max") for figure, limit in limits.items() if limit is not None]
    gates += [parse_speedup(text) for text in min_speedup or []]

    settings = {
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
    if verify:
        for model in [*models, *([baseline] if baseline else [])]:
            verify_hashes(model)
    document = run(models, BenchOptions(gates=tuple(gates), **given(settings)), baseline)
    try:
        print_document(document, output_format)
    finally:  # a reader that left does not undo the verdict
        enforce(document["verdict"])
