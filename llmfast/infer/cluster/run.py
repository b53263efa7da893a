"""Files of prompts or texts to a folder of answers, by the workers of a cluster."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.cluster import SHUTDOWN_S, find_cluster
from llmfast.errors import InputError, LlmfastError, OptionError
from llmfast.infer.cluster.parts import Part, PartFolder
from llmfast.infer.cluster.pool import Chunk, Pool
from llmfast.infer.cluster.source import Source, find_source
from llmfast.infer.jsonl import Line
from llmfast.infer.many import GOING_ON, Summary, open_work, settings_digest, text_field
from llmfast.report import note, progress
from llmfast.supervisor import GRACE_S, ask_for_grace

PART_LINES = 10_000


@dataclass(frozen=True)
class ClusterOptions:
    """How lines are divided among the workers of a cluster.

    Attributes:
        address: of a Ray cluster; None starts one on this machine, unless RAY_ADDRESS says otherwise.
        workers: processes with a model each; None is one for each machine.
        threads: intra-op threads of a worker; None divides the processors.
        parts: the form of the output, `jsonl` or `parquet`; None is the form of the input.
        part_lines: lines of the input that a part of the output answers.
    """

    address: str | None = None
    workers: int | None = None
    threads: int | None = None
    parts: str | None = None
    part_lines: int = PART_LINES


def answer_folder(
    model: Path,
    input_files: str,
    output: str,
    cluster: ClusterOptions,
    *,
    overwrite: bool = False,
    batch_size: int | None = None,
    provider: str = "cpu",
    **options: Any,
) -> Summary:
    """Answer every line of some files, on a cluster.

    Args:
        model: bundle directory, at the same place on all machines.
        input_files: a file, a directory or a pattern, of JSON lines, lines of text, or Parquet; or a URI of these.
        output: folder or URI that gets the parts. What an earlier run of the same model, options and lines left is
            kept.
        cluster: see `ClusterOptions`.
        overwrite: start over instead.
        batch_size: prompts at once in a worker, of a text-generation model; None chooses by the memory.
        provider: a name in `llmfast.providers`.
        options: those of the task's `INFER_OPTIONS` that are given.

    Raises:
        InputError: the input can't be read or has no line, or a machine has no such bundle.
        NativeCrashError: workers die one after the other.
        OptionError: an option that the task does not have.
        OutputExistsError: the output holds something else.
        ResourceError: no memory, or a full disk; what was answered is kept.
        UnsupportedError: Ray is not installed, there is no cluster, or no engine runs the model.
    """
    if cluster.part_lines < 1:
        raise OptionError(f"--part-lines {cluster.part_lines}: must be at least 1")
    bundle = ModelBundle.open(model)
    work = open_work(bundle, provider, cluster.threads, batch_size, **options)
    source = find_source(input_files)
    digest = settings_digest(bundle, options)
    form = cluster.parts or ("parquet" if source.is_parquet else "jsonl")
    folder = PartFolder(output, form, source.has_whole_ids(), overwrite)
    summary = Summary(input_files, output, bundle.manifest.task)
    ask_for_grace(SHUTDOWN_S + GRACE_S)
    run = _Run(source, folder, summary, cluster.part_lines)
    with closing(folder), closing(Pool(find_cluster(cluster.address), cluster.workers, cluster.threads)) as pool:
        try:
            pool.open(bundle.path.resolve(), digest, provider, batch_size, work.window, options)
            plan = pool.plan
            workers, threads = (f"{'s' if count > 1 else ''}" for count in (plan.workers, plan.threads))
            note(f"{plan.workers} worker{workers} of {plan.threads} thread{threads}")
            lines = source.read(text_field(bundle), work.fields, digest)
            start = time.perf_counter()
            with progress("answering") as advance:
                for chunk, outcomes in pool.answers(run.chunks(lines, pool.chunk_lines)):
                    run.settle(chunk, outcomes)
                    seconds = time.perf_counter() - start
                    advance(len(outcomes), f"answering, {run.generated_tokens / seconds:.0f} tokens/s")
            summary.seconds = time.perf_counter() - start
            summary.figures = run.figures(pool)
        except BaseException:
            run.give_up()
            raise
    if not summary.lines:
        raise InputError(f"no text in `{input_files}`", "it is empty or blank")
    folder.check_end(run.parts)
    return summary


class _Run:
    """What has been read, and what has become of it."""

    def __init__(self, source: Source, folder: PartFolder, summary: Summary, part_lines: int) -> None:
        self._source, self._folder, self._summary, self._part_lines = source, folder, summary, part_lines
        self._open: list[Part] = []
        self.parts = 0
        self.prompt_tokens = self.generated_tokens = 0

    def chunks(self, lines: Iterator[Line], size: int) -> Iterator[Chunk]:
        """Yield the lines that have no answer yet, part by part, as they are asked for."""
        while block := list(islice(lines, self._part_lines)):
            self._summary.lines += len(block)
            sound = []
            for line in block:
                if line.error is None:
                    sound.append(line)
                else:
                    self._summary.fail(line, line.error)
            part = Part(self._folder, self.parts, sound)
            self.parts += 1
            self._summary.answered_before += part.before
            self._open.append(part)
            waiting = iter(part.missing)
            while some := list(islice(waiting, size)):
                yield Chunk(some, part)

    def settle(self, chunk: Chunk, outcomes: list[Any]) -> None:
        """Write what became of the lines of a chunk."""
        for line, outcome in zip(chunk.lines, outcomes, strict=True):
            if isinstance(outcome, LlmfastError):
                self._summary.fail(line, outcome)
                chunk.part.settle(line, None)
            else:
                self.prompt_tokens += outcome.get("prompt_tokens", 0)
                self.generated_tokens += outcome.get("generated_tokens", 0)
                self._summary.answered += 1
                chunk.part.settle(line, outcome)
        self._open = [part for part in self._open if part.is_open]

    def figures(self, pool: Pool) -> dict[str, Any]:
        """Return counts and speeds for the summary."""
        seconds = self._summary.seconds
        found = pool.figures()
        figures: dict[str, Any] = {"workers": pool.plan.workers, "threads": pool.plan.threads, "deaths": pool.deaths}
        if any("generated_tokens" in one for one in found):
            return figures | {
                "prompt_tokens": self.prompt_tokens,
                "shared_tokens": sum(one.get("shared_tokens", 0) for one in found),
                "generated_tokens": self.generated_tokens,
                "tokens_per_s": self.generated_tokens / seconds,
                "exact": all(one.get("exact", True) for one in found),
            }
        return figures | {"texts_per_s": self._summary.answered / seconds}

    def give_up(self) -> None:
        """Let go of the parts that are not complete, and say what the next run will find."""
        for part in self._open:
            part.close()
        lost = 0 if self._folder.keeps_halves else sum(part.written for part in self._open)
        if kept := self._summary.answered - lost:
            note(f"note: {kept} answers are in `{self._summary.output}`; {GOING_ON}")
        if lost:
            note(f"note: {lost} answers in parts that were not complete are lost; with smaller --part-lines fewer are")
