"""Continuous batches side by side, each on a thread of its own.

On a CPU a step of a small model is many short operators, and threads that share each of them wait for one another at
every end. Lanes do not: every one reads its prompts and decodes its rows alone, with the same weights, while the others
do theirs. A lane that is the only one at work may take all threads, where its rows can (`Rows.is_alone`).
"""

import queue
import threading
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass

from llmfast.errors import LlmfastError
from llmfast.infer.batch import Batch, Counts, Event, Request
from llmfast.infer.rows import Rows
from llmfast.tokenizer import Tokenizer

# Fewer rows a lane would read the weights more often than their threads gain; measured on two cores.
_FEWEST_ROWS = 8


def count_lanes(threads: int, rows: int) -> int:
    """Return into how many lanes rows are divided."""
    return max(1, min(threads, rows // _FEWEST_ROWS))


class Lanes:
    """Answers many requests over the rows of one model.

    Args:
        rows: of each lane; their sessions may be the same, and are then called by several threads at once.
        tokenizer: the model's.

    Attributes:
        capacity: positions of a prompt with its answer.
        rows: requests under way at once.
    """

    def __init__(self, rows: Sequence[Rows], tokenizer: Tokenizer) -> None:
        self._batches = [Batch(part, tokenizer) for part in rows]
        self.capacity = min(part.capacity for part in rows)
        self.rows = sum(part.count for part in rows)
        self._happened: queue.SimpleQueue[list[Event] | BaseException] = queue.SimpleQueue()
        self._lanes: list[_Lane] = []
        self._lane_of: dict[Hashable, _Lane] = {}

    @property
    def counts(self) -> Counts:
        """What all have done."""
        return Counts.total(batch.counts for batch in self._batches)

    @property
    def pending(self) -> int:
        """Requests that were submitted and have not had their last event."""
        return len(self._lane_of)

    def submit(self, request: Request) -> None:
        """Give a request to a lane: the first one that has few, else the one with most rows free.

        Raises:
            OptionError, InputError: as `Batch.submit`.
        """
        self._batches[0].check(request)
        if not self._lanes:
            self._lanes += [_Lane(batch, self._happened, self._lanes) for batch in self._batches]
        few = (lane for lane in self._lanes if lane.pending < min(_FEWEST_ROWS, lane.rows))
        lane = next(few, None) or min(self._lanes, key=lambda one: one.pending - one.rows)
        self._lane_of[request.id] = lane
        lane.submit(request)

    def cancel(self, request_id: Hashable) -> None:
        """Drop a request; its row is free after the step that is under way."""
        if (lane := self._lane_of.pop(request_id, None)) is not None:
            lane.cancel(request_id)

    def wait(self, longest_s: float | None = None) -> list[Event]:
        """Wait for what happens next; return it with all that has happened besides.

        Args:
            longest_s: seconds; when they are over there is nothing to return. None waits as long as requests are
                pending.

        Raises:
            BaseException: what a step raised; all lanes have ended then.
        """
        events: list[Event] = []
        while self.pending and not events:
            try:
                found = [self._happened.get(timeout=longest_s)]
            except queue.Empty:
                break
            while not self._happened.empty():
                found.append(self._happened.get())
            for one in found:
                if isinstance(one, BaseException):
                    self.close()
                    raise one
                events += filter(self._take_notice, one)
        return events

    def answer(self, requests: Iterator[Request | None]) -> Generator[Event, None, None]:
        """Yield what happens, until all requests have their last event; they are taken as rows fall free.

        One that can't be answered has an event with the reason, as one that fails on its way.

        Args:
            requests: None among them is that there is none yet, and the end once all are answered.
        """
        try:
            while True:
                # One more for each lane, so that a row that falls free is filled at once.
                while self.pending < self.rows + len(self._batches) and (request := next(requests, None)) is not None:
                    try:
                        self.submit(request)
                    except LlmfastError as error:
                        yield Event(request.id, error=error)
                if not self.pending:
                    return
                yield from self.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Drop all requests, and end the threads; the next request starts others."""
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.stop()
        for lane in lanes:
            lane.join()
        for request_id, lane in self._lane_of.items():
            lane.batch.cancel(request_id)
        self._lane_of.clear()
        self._happened = queue.SimpleQueue()

    def _take_notice(self, event: Event) -> bool:
        """Return whether an event is of a request that nobody has dropped."""
        if (lane := self._lane_of.get(event.id)) is None:
            return False
        if event.is_last:
            del self._lane_of[event.id]
            lane.pending -= 1
        return True


class _Lane(threading.Thread):
    """Steps a batch that no other thread touches.

    Attributes:
        pending: requests that it has.
    """

    def __init__(
        self, batch: Batch, happened: "queue.SimpleQueue[list[Event] | BaseException]", lanes: "Sequence[_Lane]"
    ) -> None:
        super().__init__(daemon=True)
        self.batch = batch
        self.pending = 0
        self.rows = batch.rows.count
        self._happened, self._lanes = happened, lanes
        self._inbox: queue.SimpleQueue[Request | _Cancelled | None] = queue.SimpleQueue()
        self.start()

    def submit(self, request: Request) -> None:
        self.pending += 1
        self._inbox.put(request)

    def cancel(self, request_id: Hashable) -> None:
        self.pending -= 1
        self._inbox.put(_Cancelled(request_id))

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._inbox.put(None)

    def run(self) -> None:
        try:
            while self._take():
                self.batch.rows.is_alone = not any(lane.pending for lane in self._lanes if lane is not self)
                self._happened.put(self.batch.step())
        except BaseException as error:
            self._happened.put(error)

    def _take(self) -> bool:
        """Do as the inbox says, and wait for it while there is nothing else to do; return False at the end."""
        while not self._inbox.empty() or not (self.batch.waiting or self.batch.active):
            message = self._inbox.get()
            if message is None:
                return False
            if isinstance(message, Request):
                self.batch.submit(message)
            else:
                self.batch.cancel(message.id)
        return True


@dataclass(frozen=True)
class _Cancelled:
    """A request that nobody waits for."""

    id: Hashable
