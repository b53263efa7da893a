"""`llmfast infer`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmfast import registry, report
from llmfast.commands._options import AllowFallback, NoTuned, Provider, Threads, Verify, check_engine, given
from llmfast.errors import OptionError

SUMMARY = "A prompt to an answer; a text to its labels, vector, entities or rank; an image to labels, speech to text."

_FORMATS = ("text", "json", "jsonl")


def infer(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Bundle to run.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Text to answer, classify or embed; - reads stdin."),
    ] = None,
    input_files: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="File with a text (or path of image or audio) a line; .jsonl with a JSON object a line.",
        ),
    ] = None,
    text_pair: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Second text of a pair to classify; one for each --prompt, or for all."),
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="What is asked of the --context.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text that holds the answer; - reads stdin.")
    ] = None,
    allow_no_answer: Annotated[
        bool, typer.Option("--allow-no-answer", help="The --context need not hold an answer.")
    ] = False,
    query: Annotated[str | None, typer.Option(metavar="TEXT", help="What the --document texts are ranked by.")] = None,
    document: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to rank; give several, or --input.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Image to classify or embed; may be repeated.")
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="WAV file to write down or classify; may be repeated.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What an --image may show; give several.")
    ] = None,
    hypothesis_template: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text that a --label makes, in place of {}.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What a chat model is told first.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt, without the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate, or of an answer's span.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Randomness; 0 is greedy.")] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample among the k likeliest tokens, 0 is all; words for a mask; documents; labels."),
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that make up p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages tokens seen before.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text that ends the answer; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    speculate: Annotated[
        bool | None,
        typer.Option(
            "--speculate/--no-speculate",
            help="Draft tokens, verify several a step; the default does where it pays and can't change the answer.",
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Smaller model that drafts; same tokenizer.")
    ] = None,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keeps the prompt's keys and values; the next one that begins alike starts there."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File for the answers to --input, .jsonl; for vectors, .npy."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts answered at once, with --output; 64 by default, fewer if memory is short."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: --input, also a pattern or Parquet, over a cluster to a folder.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: HOST:PORT or auto; the default starts one on this machine.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes with a model each, with ray; the default is one a machine.")
    ] = None,
    parts: Annotated[
        str | None, typer.Option(metavar="FORM", help="jsonl or parquet, with ray; the default is that of --input.")
    ] = None,
    part_lines: Annotated[
        int | None, typer.Option(help="Lines answered in a part of the output, with ray; 10,000 by default.")
    ] = None,
    source_lang: Annotated[str | None, typer.Option(help="Language of the text to translate.")] = None,
    target_lang: Annotated[str | None, typer.Option(help="Language to translate to.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams of an encoder-decoder's search; 1 is greedy.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Fewest tokens of a translation or summary.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Above 0 favours long results of beams.")] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="Never say n tokens in a row twice.")] = None,
    provider: Provider = "cpu",
    allow_fallback: AllowFallback = False,
    threads: Threads = None,
    no_tuned: NoTuned = False,
    verify: Verify = False,
    output_format: Annotated[
        str, typer.Option("--format", help="text, json for one document, or jsonl for one a line.")
    ] = "text",
) -> None:
    """Run a model on texts, images or sound; what it answers depends on its task.

    Example: llmfast infer int4 --prompt "What is the capital of France?"

    \b
    text-classification    infer nli --prompt "It rains." --text-pair "It is wet."
    token-classification   infer ner --prompt "Ada lives in Rome"
    question-answering     infer qa --question "Who lives?" --context "Ada lives"
    fill-mask              infer bert --prompt "Rome is in [MASK]."
    text-ranking           infer reranker --query "Rome" --input documents.txt
    feature-extraction     infer minilm --prompt "a cat" --prompt "a dog"
    image-classification   infer vit --image cat.jpg
    audio-classification   infer hubert --audio speech.wav
    image-feature-extraction         infer dinov2 --image a.jpg --image b.jpg
    zero-shot-image-classification   infer clip --image a.jpg --label a --label b
    automatic-speech-recognition     infer wav2vec2 --audio speech.wav
    a file of any task     infer int4 --input prompts.jsonl -o answers.jsonl
    files, on a cluster    infer int4 --input 'data/*.jsonl' -o DIR --engine ray
    """
    if output_format not in _FORMATS:
        raise OptionError(f"unknown format `{output_format}`", f"choose from: {', '.join(_FORMATS)}")
    from llmfast.bundle import TEXT_GENERATION, UNKNOWN_TASK, ModelBundle
    from llmfast.infer import stage
    from llmfast.infer.jsonl import is_jsonl
    from llmfast.infer.sampling import SAMPLING_OPTIONS, Sampling
    from llmfast.runtime import with_fallback
    from llmfast.tuned import ignoring_tuned
    from llmfast.verify import verify_hashes

    given_texts = given({"prompt": prompt, "context": context, "document": document, "image": image, "audio": audio})
    options = given(
        {
            "text_pair": text_pair,
            "question": question,
            "allow_no_answer": allow_no_answer or None,
            "query": query,
            "label": label,
            "hypothesis_template": hypothesis_template,
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
            "speculate": speculate,
            "draft": draft,
            "prompt_cache": prompt_cache,
            "source_lang": source_lang,
            "target_lang": target_lang,
            "num_beams": num_beams,
            "min_tokens": min_tokens,
            "length_penalty": length_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
        }
    )
    provider = with_fallback(provider, allow_fallback)
    if verify:
        verify_hashes(model)
    with ignoring_tuned(no_tuned):
        cluster = given({"address": address, "workers": workers, "parts": parts, "part_lines": part_lines})
        check_engine(engine, cluster)
        if engine == "ray":
            if given_texts:
                raise OptionError(f"--{next(iter(given_texts))} is for --engine local", "give --input FILES")
            if input_files is None or output is None:
                raise OptionError("--engine ray needs --input FILES and --output FOLDER")
            common = {"overwrite": overwrite, "batch_size": batch_size, "provider": provider}
            cluster["threads"] = threads
            _answer_folder(model, input_files, output, output_format, cluster, **common, **options)
            return
        input_file, output_file = (None if name is None else Path(name) for name in (input_files, output))
        if input_file is not None and (is_jsonl(input_file) or (output_file is not None and is_jsonl(output_file))):
            if given_texts:
                raise OptionError(f"--{next(iter(given_texts))} and --input exclude each other")
            if output_file is None or not is_jsonl(output_file):
                raise OptionError(f"--input `{input_file}` needs --output FILE.jsonl for the answers")
            settings = {"overwrite": overwrite, "batch_size": batch_size, "provider": provider, "threads": threads}
            _answer_file(model, input_file, output_file, output_format, **settings, **options)
            return
        if batch_size is not None:
            raise OptionError("--batch-size is for a file of prompts", "give --input FILE and --output FILE.jsonl")
        options |= given({"output": output_file, "overwrite": overwrite or None})
        bundle = ModelBundle.open(model)
        stage.check_options(bundle, [*given_texts, *options])
        task = TEXT_GENERATION if bundle.manifest.task == UNKNOWN_TASK else bundle.manifest.task
        texts = _read_texts(given_texts.get(stage.text_option(task)), input_file, stage.text_option(task))
        is_one = input_file is None and len(texts) == 1
        if task != TEXT_GENERATION or not is_one:
            answers = stage.answer(model, texts, provider=provider, threads=threads, **options)
            if output_file is None:
                _print_answers(answers, registry.load("tasks", task).spell, output_format, is_one)
            return
        sampling = Sampling(**{key: options.pop(key) for key in SAMPLING_OPTIONS if key in options})
        try:
            generation = stage.infer(
                model,
                texts[0],
                emit=report.write if output_format == "text" else lambda piece: None,
                sampling=sampling,
                provider=provider,
                threads=threads,
                **options,
            )
        except KeyboardInterrupt:
            report.note("")  # ends the line of half an answer
            raise
        if output_format == "text":
            report.out("")
        else:
            _print_answers([generation.document(texts[0])], str, output_format, is_one)
        report.note(stage.spell_speed(generation))


def _answer_file(model: Path, input_file: Path, output: Path, output_format: str, **settings: Any) -> None:
    """Answer a file of prompts or texts, and print what was done."""
    from llmfast.infer.many import answer_file

    _print_summary(answer_file(model, input_file, output, **settings), output_format)


def _answer_folder(
    model: Path, input_files: str, output: str, output_format: str, cluster: dict[str, Any], **settings: Any
) -> None:
    """Answer files of prompts or texts on a cluster, and print what was done."""
    from llmfast.infer.cluster.run import ClusterOptions, answer_folder

    _print_summary(answer_folder(model, input_files, output, ClusterOptions(**cluster), **settings), output_format)


def _print_summary(summary: Any, output_format: str) -> None:
    from llmfast.errors import InputError, NativeCrashError
    from llmfast.infer.many import spell

    if output_format == "text":
        report.out(spell(summary))
    else:
        report.out(report.to_json(summary.document(), indent=2 if output_format == "json" else None))
    message = f"no answer to {summary.failed} of the {summary.lines} lines of `{summary.input}`"
    if summary.crashed:
        raise NativeCrashError(
            f"{message}: workers died while answering {summary.crashed} of them",
            "the same command tries only those again; `llmfast infer` with one of them alone shows why",
        )
    if summary.failed:
        raise InputError(message, "mend them where they are, then run the same command again: it answers only those")


def _read_texts(texts: list[str] | None, input_file: Path | None, option: str) -> list[str]:
    """Return the texts to run the model on, from the option of its task, standard input or a file.

    Those of a task of images or sound are paths.
    """
    from llmfast.text import read_lines, read_stdin

    is_file = option in ("image", "audio")
    kind, value = (option, "FILE") if is_file else ("text", "TEXT")
    if (texts is None) == (input_file is None):
        what = f"no {kind} to run on" if texts is None else f"--{option} and --input exclude each other"
        listed = "a path" if is_file else "a text"
        raise OptionError(what, f"give --{option} {value}, or --input FILE with {listed} a line")
    if input_file is not None:
        return read_lines(input_file)
    if is_file:
        return list(texts or ())
    return [read_stdin() if text == "-" else text for text in texts or ()]


def _print_answers(
    answers: list[dict[str, Any]], spell: Callable[[dict[str, Any]], str], output_format: str, is_one: bool
) -> None:
    """Print answers: as one JSON document (an object for one text, else a list), as JSON lines, or for people."""
    if output_format == "json":
        report.out(report.to_json(answers[0] if is_one else answers))
    elif output_format == "jsonl":
        for answer in answers:
            report.out(report.to_json(answer, indent=None))
    else:
        spelled = [spell(answer) for answer in answers]
        report.out(("\n\n" if any("\n" in text for text in spelled) else "\n").join(spelled))
