"""A file of prompts or texts to a file of answers: planned, resumed, shown, counted."""

import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmfast.bundle import MANIFEST, TEXT_GENERATION, UNKNOWN_TASK, ModelBundle, sha256
from llmfast.errors import InputError, LlmfastError, NativeCrashError, OptionError
from llmfast.infer.jsonl import AnswerFile, Line, read_lines
from llmfast.infer.many_prompts import Prompts
from llmfast.infer.many_texts import Texts
from llmfast.infer.stage import check_options, text_option
from llmfast.report import note, progress
from llmfast.runtime import suit_provider

# What a run that stops says of the answers that it leaves.
GOING_ON = "the same command, without --overwrite, goes on from there"
# Reasons that the JSON document holds; there may be a million, and all are printed.
_LISTED = 1000


class Work(Protocol):
    """What a kind of task does with lines.

    Attributes:
        fields: names of a line that it looks at.
        window: lines that go through the model together.
        is_outgrown: a line that was checked needs more room than what is open; `run` has to begin again.
    """

    fields: tuple[str, ...]
    window: int

    @property
    def is_outgrown(self) -> bool: ...

    def check(self, line: Line) -> None:
        """Look at a line before anything runs, to plan; raise why it can't be answered."""

    def run(self, lines: Iterator[Line | None], remaining: int, done: "Done", failed: "Failed") -> None:
        """Answer lines, in any order; None among them is that there is none yet, and ends it once all are answered."""

    def speed(self, seconds: float) -> str:
        """Return how fast it goes, for people."""

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return counts and speed for the summary."""


Done = Callable[[Line, dict[str, Any]], None]
Failed = Callable[[Line, LlmfastError], None]


@dataclass
class Summary:
    """What a run did.

    Attributes:
        input: path of the prompts.
        output: path of the answers.
        task: what the model is for.
        lines: lines of the input that are not blank.
        answered: lines answered by this run.
        answered_before: lines answered by an earlier run of the same command.
        failed: lines without an answer.
        crashed: of these, lines whose workers died while answering them.
        errors: their numbers and the reasons, of the first thousand.
        seconds: time of answering, without the time to plan and to open the model.
        figures: counts and speeds of the task.
    """

    input: str
    output: str
    task: str
    lines: int = 0
    answered: int = 0
    answered_before: int = 0
    failed: int = 0
    crashed: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def fail(self, line: Line, error: LlmfastError) -> None:
        """Count a line without an answer, and say why."""
        self.failed += 1
        self.crashed += isinstance(error, NativeCrashError)
        reason = error.message.removeprefix(f"{line.place}: ")
        note(f"no answer: {line.place}: {reason}")
        if len(self.errors) < _LISTED:
            self.errors.append({"line": line.number, "error": reason})

    def document(self) -> dict[str, Any]:
        """Return the summary as one JSON object."""
        document = asdict(self)
        figures: dict[str, Any] = document.pop("figures")
        return document | figures


def answer_file(
    model: Path,
    input_file: Path,
    output: Path,
    *,
    overwrite: bool = False,
    batch_size: int | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    **options: Any,
) -> Summary:
    """Answer every line of a file.

    Args:
        model: bundle directory.
        input_file: JSON objects, one a line (`.jsonl`, `.ndjson`), or a text a line.
        output: gets a JSON object a line. What an earlier run of the same model, options and lines left is kept.
        overwrite: start over instead.
        batch_size: prompts at once, of a text-generation model; None chooses by the memory.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        options: those of the task's `INFER_OPTIONS` that are given.

    Raises:
        InputError: the input can't be read or has no line.
        OptionError: an option that the task does not have.
        OutputExistsError: the output holds something else.
        ResourceError: no memory, or a full disk; what was answered is kept.
        UnsupportedError: no engine runs the model.
    """
    if input_file.exists() and output.exists() and input_file.samefile(output):
        raise OptionError(f"--output `{output}` is the input", "name another file")
    bundle = ModelBundle.open(model)
    work = open_work(bundle, provider, threads, batch_size, **options)
    summary = Summary(str(input_file), str(output), bundle.manifest.task)

    read = _reader(bundle, input_file, options)
    keys = _plan(read, work, summary)
    if not summary.lines:
        raise InputError(f"no text in `{input_file}`", "the file is empty or blank")
    file = AnswerFile(output, keys, overwrite)
    summary.answered_before = int(file.done.sum())
    _tell_beginning(file, len(keys))
    start = time.perf_counter()
    remaining = len(keys) - summary.answered_before
    try:
        with progress("answering", len(keys)) as advance:
            advance(summary.answered_before)

            def done(line: Line, answer: dict[str, Any]) -> None:
                file.write(line, answer)
                summary.answered += 1
                advance(1, f"answering, {work.speed(time.perf_counter() - start)}")

            if remaining:
                work.run(_remaining(read, keys, file.done), remaining, done, summary.fail)
    except BaseException:
        if count := file.count():
            note(f"note: {count} of {len(keys)} answers are in `{output}`; {GOING_ON}")
        raise
    finally:
        file.close()
    summary.seconds = time.perf_counter() - start
    summary.figures = work.figures(summary.seconds)
    file.put_in_order()
    return summary


def spell(summary: Summary) -> str:
    """Return a summary as a line for people."""
    figures = summary.figures
    parts = [f"{summary.answered + summary.answered_before} of {summary.lines} lines answered in `{summary.output}`"]
    if summary.answered_before:
        parts.append(f"{summary.answered_before} of them before")
    if "prompt_tokens" in figures:
        parts.append(f"{figures['prompt_tokens']} prompt tokens ({figures['shared_tokens']} of them copied)")
        parts.append(f"{figures['generated_tokens']} generated in {summary.seconds:.1f} s")
        parts.append(f"{figures['tokens_per_s']:.1f} tokens/s")
    elif summary.answered:
        parts.append(f"{summary.seconds:.1f} s, {figures['texts_per_s']:.1f} texts/s")
    return ", ".join(parts)


def open_work(
    bundle: ModelBundle,
    provider: str,
    threads: int | None,
    batch_size: int | None,
    neighbours: int = 1,
    **options: Any,
) -> Work:
    """Return what answers lines with a model; nothing is opened yet.

    Args:
        bundle: the model.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        batch_size: prompts at once, of a text-generation model; None chooses by the memory.
        neighbours: processes that share this machine's memory, this one included.
        options: those of the task's `INFER_OPTIONS` that are given.

    Raises:
        OptionError: an option that the task, or a file of its texts, does not have.
        UnsupportedError: the provider is known not to run the model, or its number format slowly.
    """
    check_options(bundle, options)
    provider = suit_provider(bundle, provider)
    if bundle.manifest.task in (TEXT_GENERATION, UNKNOWN_TASK):
        return Prompts(bundle, provider, threads, batch_size, neighbours, **options)
    return Texts(bundle, provider, threads, **options)


def text_field(bundle: ModelBundle) -> str:
    """Return what a line of plain text is called."""
    return text_option(TEXT_GENERATION if bundle.manifest.task == UNKNOWN_TASK else bundle.manifest.task)


def settings_digest(bundle: ModelBundle, options: dict[str, Any]) -> str:
    """Return a hash of model and options: what all answers depend on."""
    manifest = bundle.path / MANIFEST
    model = sha256(manifest if manifest.is_file() else bundle.model)
    return hashlib.sha256(json.dumps([model, options], sort_keys=True, default=str).encode()).hexdigest()


def _reader(bundle: ModelBundle, input_file: Path, options: dict[str, Any]) -> Callable[[], Iterator[Line]]:
    """Return what begins to read the input; its keys stand for model and options too."""
    name, digest = text_field(bundle), settings_digest(bundle, options)
    return lambda: read_lines(input_file, name, digest)


def _plan(read: Callable[[], Iterator[Line]], work: Work, summary: Summary) -> np.ndarray:
    """Look at all lines; return the keys of those that can be answered, uint64."""
    keys = array("Q")
    unknown: set[str] = set()
    with progress("reading prompts") as advance:
        for line in read():
            summary.lines += 1
            advance()
            try:
                if line.error is not None:
                    raise line.error
                work.check(line)
            except LlmfastError as error:
                summary.fail(line, error)
            else:
                keys.append(line.key)
                if len(unknown) < _LISTED:
                    unknown |= set(line.fields) - set(work.fields)
    if unknown:
        note(f"note: fields that say nothing to this model: {', '.join(sorted(unknown))}")
    return np.array(keys, np.uint64)


def _remaining(read: Callable[[], Iterator[Line]], keys: np.ndarray, done: np.ndarray) -> Iterator[Line]:
    """Yield the lines that can be answered and are not yet."""
    place = 0
    for line in read():
        if place < len(keys) and line.key == keys[place]:
            if not done[place]:
                yield line
            place += 1
    if place < len(keys):
        raise InputError("the prompts changed while they were read", "run the command again when they are complete")


def _tell_beginning(file: AnswerFile, count: int) -> None:
    if file.dropped:
        note(f"note: the last line of `{file.path}` was cut off; it is answered again")
    if file.done.any():
        note(f"note: {int(file.done.sum())} of {count} answers are there already (--overwrite starts over)")
