"""Prompts to answers in continuous batches."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.errors import LlmfastError, OptionError
from llmfast.infer.batch import Counts, Request, check_prompt
from llmfast.infer.decoder import context_length
from llmfast.infer.generate import Generation, check_limits, check_system
from llmfast.infer.jsonl import Line
from llmfast.infer.lanes import Lanes
from llmfast.infer.memory import DEFAULT_ROWS, MemoryPlan
from llmfast.infer.opening import open_lanes
from llmfast.infer.requests import FIELDS, RequestReader
from llmfast.infer.sampling import SAMPLING_OPTIONS, Sampling
from llmfast.report import note
from llmfast.tokenizer import Tokenizer

# Of the task's options, those that a request has beside its sampling.
_OPTIONS = ("system", "raw", "max_tokens", "stop")


class Prompts:
    """Answers lines with a text-generation model.

    Args:
        bundle: the model.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        batch_size: prompts at once; None chooses by the memory.
        neighbours: processes that share this machine's memory, this one included.
        options: of `infer` that hold for all lines.
    """

    fields = FIELDS

    def __init__(
        self,
        bundle: ModelBundle,
        provider: str,
        threads: int | None,
        batch_size: int | None,
        neighbours: int = 1,
        **options: Any,
    ) -> None:
        self._bundle = bundle
        self._provider, self._threads = provider, threads
        self._batch_size, self._neighbours = batch_size, neighbours
        self.window = batch_size or DEFAULT_ROWS
        sampling = {name: options.pop(name) for name in SAMPLING_OPTIONS if name in options}
        for name in options:
            if name not in _OPTIONS:
                raise OptionError(f"--{name.replace('_', '-')} is for one prompt, not for a file of them")
        self._tokenizer = Tokenizer.load(bundle.path)
        self._reader = RequestReader(self._tokenizer, sampling=sampling, **options)
        Sampling(**sampling)
        check_limits(self._reader.max_tokens, self._reader.stop)
        check_system(self._tokenizer, self._reader.system, self._reader.raw)
        if batch_size is not None and batch_size < 1:
            raise OptionError(f"--batch-size {batch_size}: must be at least 1")
        self._context_length = context_length(bundle)
        self._vocab_size = int(bundle.manifest.architecture.get("vocab_size", 0)) or self._tokenizer.vocab_size
        self._capacity = 1
        self._lanes: Lanes | None = None
        self._before = Counts()  # of lanes that were too short
        self._memory: MemoryPlan | None = None

    def check(self, line: Line) -> None:
        """Look at a line, and make room for it."""
        request = self._reader.read(line)
        check_limits(request.max_tokens, request.stop)
        check_prompt(request.prompt_ids, self._context_length, self._vocab_size)
        needed = min(len(request.prompt_ids) + request.max_tokens, self._context_length)
        self._capacity = max(self._capacity, needed)

    @property
    def is_outgrown(self) -> bool:
        """Whether a line that was checked needs a longer row than there is."""
        return self._lanes is not None and self._lanes.capacity < self._capacity

    def run(
        self,
        lines: Iterator[Line | None],
        remaining: int,
        done: Callable[[Line, dict[str, Any]], None],
        failed: Callable[[Line, LlmfastError], None],
    ) -> None:
        """Answer lines; each is done when its answer is, whatever the order."""
        lanes = self._open(remaining)
        pending: dict[Any, Line] = {}

        def requests() -> Iterator[Request | None]:
            for line in lines:
                if line is not None:
                    pending[line.number] = line
                yield None if line is None else self._reader.read(line)

        with closing(lanes.answer(requests())) as events:
            for event in events:
                if event.error is not None:
                    failed(pending.pop(event.id), event.error)
                elif event.generation is not None:
                    done(pending.pop(event.id), _record(event.generation))
        if self._counts.differing:
            note(
                "note: in a batch, this model's kernels round other than for one prompt; answers may differ from "
                "those of one prompt at a time (--batch-size 1)"
            )

    def speed(self, seconds: float) -> str:
        """Return how fast it goes, for people."""
        return f"{self._counts.generated_tokens / seconds:.0f} tokens/s"

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return counts and speed for the summary."""
        if self._memory is None:
            return {"generated_tokens": 0}
        counts = self._counts
        return {
            **asdict(counts),
            "tokens_per_s": counts.generated_tokens / seconds,
            "exact": counts.differing == 0,
            "memory": asdict(self._memory),
        }

    @property
    def _counts(self) -> Counts:
        return Counts.total([self._before, *([self._lanes.counts] if self._lanes else [])])

    def _open(self, remaining: int) -> Lanes:
        if self._lanes is not None and not self.is_outgrown:
            return self._lanes
        if self._lanes is not None:  # opened for shorter lines; so that this is rare, there is now room for more
            self._before = self._counts
            self._capacity = max(self._capacity, min(2 * self._lanes.capacity, self._context_length))
            self._lanes = None  # its memory is free before the next one's is planned
        rows, self._memory = open_lanes(
            self._bundle,
            self._provider,
            self._threads,
            self._capacity,
            remaining,
            self._batch_size,
            self._neighbours,
        )
        note(f"{remaining} prompts; {self._memory}")
        self._lanes = Lanes(rows, self._tokenizer)
        return self._lanes


def _record(generation: Generation) -> dict[str, Any]:
    return {
        "answer": generation.text,
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": generation.generated_tokens,
        "finish_reason": generation.finish_reason,
    }
