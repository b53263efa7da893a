"""Continuous batches side by side, each on a thread of its own.

On a CPU a step of a small model is many short operators, and threads that share each of them wait for one another at
every end. Lanes do not: every one reads its prompts and decodes its rows alone, with the same weights, while the others
do theirs. A prompt alone is read by one thread then, so this is for many of them, not for the first token of one.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence

from llmfast.infer.batch import Batch, Counts, Event, Request
from llmfast.infer.rows import Rows
from llmfast.tokenizer import Tokenizer

# Fewer rows a lane would read the weights more often than their threads gain; measured on two cores.
_FEWEST_ROWS = 8


def count_lanes(threads: int, rows: int) -> int:
    """Return into how many lanes rows are divided."""
    return max(1, min(threads, rows // _FEWEST_ROWS))


class Lanes:
    """Answers many requests over the rows of one model; not again once answers were not read to their end.

    Args:
        rows: of each lane; their sessions may be the same, and are then called by several threads at once.
        tokenizer: the model's.
    """

    def __init__(self, rows: Sequence[Rows], tokenizer: Tokenizer) -> None:
        self._batches = [Batch(part, tokenizer) for part in rows]
        self.capacity = min(part.capacity for part in rows)

    @property
    def counts(self) -> Counts:
        """What all have done."""
        return Counts.total(batch.counts for batch in self._batches)

    def answer(self, requests: Iterator[Request | None]) -> Generator[Event, None, None]:
        """Yield what happens, until all requests have their last event; they are taken as rows fall free.

        Args:
            requests: None among them is that there is none yet, and the end once all are answered.
        """
        happened: queue.SimpleQueue[tuple[_Lane, list[Event] | BaseException]] = queue.SimpleQueue()
        lanes = [_Lane(batch, happened) for batch in self._batches]
        try:
            while True:
                _feed(lanes, requests)
                if not any(lane.pending for lane in lanes):
                    return
                lane, events = happened.get()
                if isinstance(events, BaseException):
                    raise events
                lane.pending -= sum(event.generation is not None or event.error is not None for event in events)
                yield from events
        finally:
            for lane in lanes:
                lane.stop()
            for lane in lanes:
                lane.join()


def _feed(lanes: Sequence["_Lane"], requests: Iterator[Request | None]) -> None:
    """Give each lane one more request than it has rows, so that a row that falls free is filled at once."""
    while True:
        lane = min(lanes, key=lambda one: one.pending - one.rows)
        if lane.pending > lane.rows or (request := next(requests, None)) is None:
            return
        lane.submit(request)


class _Lane(threading.Thread):
    """Steps a batch that no other thread touches."""

    def __init__(self, batch: Batch, happened: "queue.SimpleQueue[tuple[_Lane, list[Event] | BaseException]]") -> None:
        super().__init__(daemon=True)
        self.pending = 0
        self.rows = batch.rows.count
        self._batch, self._happened = batch, happened
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.start()

    def submit(self, request: Request) -> None:
        self.pending += 1
        self._inbox.put(request)

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._inbox.put(None)

    def run(self) -> None:
        try:
            while self._take():
                self._happened.put((self, self._batch.step()))
        except BaseException as error:
            self._happened.put((self, error))

    def _take(self) -> bool:
        """Submit what came, and wait for it while there is nothing to do; return False at the end."""
        while not self._inbox.empty() or not (self._batch.waiting or self._batch.active):
            request = self._inbox.get()
            if request is None:
                return False
            self._batch.submit(request)
        return True
