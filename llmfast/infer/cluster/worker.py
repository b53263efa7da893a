"""What runs in an actor: one model, and the lines that it is answering.

Chunks of lines come from several threads and go through one batch, so that the rows that the last lines of a chunk
leave free are taken by the first ones of the next. Nothing here knows Ray.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, LlmfastError
from llmfast.infer.jsonl import Line
from llmfast.infer.many import Work, open_work, settings_digest
from llmfast.kept import keeping

Outcome = dict[str, Any] | LlmfastError

_MANY = 1 << 30  # lines may come; how many is not known here


class _Chunk:
    """Lines that were handed over together, and what became of them."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.outcomes: dict[int, Outcome] = {}
        self.future: Future[list[Outcome]] = Future()

    def settle(self, line: Line, outcome: Outcome) -> None:
        """Note the answer to a line, or the reason why there is none."""
        self.outcomes[line.number] = outcome
        if len(self.outcomes) == len(self.lines):
            self.future.set_result([self.outcomes[one.number] for one in self.lines])


class LineWorker:
    """Answers chunks of lines, several at once.

    Args:
        model: bundle directory on this machine.
        digest: of model and options, as who hands out the lines has it.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        batch_size: prompts at once; None chooses by the memory.
        neighbours: workers on this machine.
        options: of `infer` that hold for all lines.

    Raises:
        InputError: there is no bundle, or another one.
    """

    def __init__(
        self,
        model: Path,
        digest: str,
        provider: str,
        threads: int,
        batch_size: int | None,
        neighbours: int,
        options: Mapping[str, Any],
    ) -> None:
        bundle = ModelBundle.open(model)
        if settings_digest(bundle, dict(options)) != digest:
            raise InputError(f"`{model}` is another model than where the run was started", "copy the bundle again")
        self._work: Work = open_work(bundle, provider, threads, batch_size, neighbours, **options)
        self._chunks: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
        self._ready: deque[Line] = deque()
        self._chunk_of: dict[int, _Chunk] = {}
        self._failure: BaseException | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def answer(self, lines: Sequence[Line]) -> list[Outcome]:
        """Return the answer to each line, or the reason why there is none; may be called in many threads at once.

        Raises:
            LlmfastError: what keeps this worker from answering anything: no memory, no engine for the model.
        """
        chunk = _Chunk(lines)
        self._chunks.put(chunk)
        return chunk.future.result()

    def figures(self) -> dict[str, Any]:
        """Return what this worker has done, as the summary of a local run has it."""
        return self._work.figures(1.0)

    def _serve(self) -> None:
        with keeping():
            while True:
                try:
                    if self._failure is not None:
                        self._chunks.get().future.set_exception(self._failure)
                        continue
                    if not self._ready:
                        self._take(self._chunks.get())
                    self._work.run(self._feed(), _MANY, self._settle, self._settle)
                except Exception as error:  # answered with it; whoever hands out the lines decides
                    self._failure = error
                    for chunk in set(self._chunk_of.values()):
                        chunk.future.set_exception(error)

    def _take(self, chunk: _Chunk) -> None:
        """Look at the lines of a chunk, and queue those that can be answered."""
        for line in chunk.lines:
            self._chunk_of[line.number] = chunk
            try:
                self._work.check(line)
            except LlmfastError as error:
                self._settle(line, error)
            else:
                self._ready.append(line)

    def _feed(self) -> Iterator[Line | None]:
        """Yield lines; None when there is none yet, or when the next one needs more room than there is."""
        while True:
            while not self._ready and not self._chunks.empty():
                self._take(self._chunks.get())
            yield self._ready.popleft() if self._ready and not self._work.is_outgrown else None

    def _settle(self, line: Line, outcome: Outcome) -> None:
        self._chunk_of.pop(line.number).settle(line, outcome)
