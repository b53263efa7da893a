"""Requests from many connections, one model in a child process: who waits, who is answered, who is dropped.

Everything but the model's turns runs on the event loop; a turn runs in a thread that waits for the child. Requests wait
here until a row is free, so that a crash of the child takes only those with it that it was answering.

The child goes on answering between two turns: a turn hands requests over, and takes what has happened since the last.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from llmfast.errors import LlmfastError, NativeCrashError, ResourceError
from llmfast.infer.batch import Event
from llmfast.report import note
from llmfast.serve.model import Facts
from llmfast.worker import Worker, as_failure

_MOST_RESTARTS, _RESTART_WINDOW_S = 3, 60.0
_BACKOFF_S = 0.5

Made = TypeVar("Made")


class BusyError(Exception):
    """The queue is full."""


class ClosedError(Exception):
    """The model can't be run any more; the server is going down."""


class ExpiredError(Exception):
    """A request waited too long for a row."""


@dataclass
class Ticket:
    """A request under way.

    Attributes:
        id: unique.
        fields: as `RequestReader` takes them.
        submitted: monotonic seconds.
        in_pieces: it wants an event for each token, not the first and the last only.
        events: what happens to it; an exception is the last.
    """

    id: int
    fields: Mapping[str, Any]
    submitted: float
    in_pieces: bool = True
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)

    async def next(self) -> Event:
        """Return the next event, or raise what ended the request."""
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        if event.error is not None:
            raise event.error
        return event


class Scheduler:
    """Serves tickets in turns.

    Attributes:
        facts: of the model.
        failure: why nothing is answered any more.
        give_up: called then.
        restarted: called when the child is to be started again.

    Args:
        open_worker: starts the child process with a `ServedModel`; takes seconds.
        queue_size: requests that may wait for a row.
        queue_timeout_s: how long.
    """

    def __init__(
        self,
        open_worker: Callable[[], Worker],
        queue_size: int,
        queue_timeout_s: float,
    ) -> None:
        self._open_worker = open_worker
        self.give_up: Callable[[], None] = lambda: None
        self.restarted: Callable[[], None] = lambda: None
        self._queue_size, self._queue_timeout_s = queue_size, queue_timeout_s
        self._worker = open_worker()
        self.facts: Facts = self._worker.call("describe")
        self.failure: BaseException | None = None
        self._restarts: list[float] = []  # of the last minute, monotonic seconds
        self._thread = ThreadPoolExecutor(1, "model")
        self._ids = itertools.count()
        self._waiting: deque[Ticket] = deque()
        self._active: dict[int, Ticket] = {}
        self._cancelled: list[int] = []
        self._wake = asyncio.Event()
        self._closed = False
        self._waiting_texts = 0  # requests for vectors whose turn has not come
        self._turn = asyncio.Lock()  # of embeddings: the next one waits until a crashed model is there again

    @property
    def waiting(self) -> int:
        """Requests without a row, or whose turn has not come."""
        return len(self._waiting) + self._waiting_texts

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return len(self._active) + self._turn.locked()

    def submit(self, fields: Mapping[str, Any], in_pieces: bool = True) -> Ticket:
        """Queue a request.

        Args:
            fields: as `RequestReader` takes them.
            in_pieces: make an event for each token, not for the first and the last only.

        Raises:
            BusyError: too many wait.
            ClosedError: no more are taken.
        """
        self._check_open(len(self._waiting) - max(0, self.facts.rows - len(self._active)))
        ticket = Ticket(next(self._ids), fields, time.monotonic(), in_pieces)
        self._waiting.append(ticket)
        self._wake.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drop a request that nobody waits for; its row is free after the step that is under way."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif self._active.pop(ticket.id, None) is not None:
            self._cancelled.append(ticket.id)
            self._wake.set()

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """Return the vector of each text, and how many tokens they have.

        What nobody waits for any more goes on to its end once it has begun.

        Raises:
            BusyError: too many wait.
            ClosedError: no more are taken.
            ExpiredError: waited too long for its turn.
            LlmfastError: as the model raises it.
        """
        self._check_open(self._waiting_texts - (not self._turn.locked()))
        self._waiting_texts += 1
        try:
            await asyncio.wait_for(self._turn.acquire(), self._queue_timeout_s)
        except TimeoutError:
            raise ExpiredError from None
        finally:
            self._waiting_texts -= 1
        call = asyncio.ensure_future(self._call(lambda: self._embed(texts)))
        call.add_done_callback(lambda _: self._turn.release())
        found: tuple[list[list[float]], int] = await asyncio.shield(call)
        return found

    async def run(self) -> None:
        """Serve until cancelled, or until the model can't be run any more."""
        while not self._closed:
            if not (self._active or self._waiting or self._cancelled):
                self._wake.clear()
                await self._wake.wait()
            self._expire()
            messages = [(ticket.id, ticket.fields) for ticket in self._admit()]
            cancelled, self._cancelled = self._cancelled, []
            try:
                events = await self._call(partial(self._worker.call, "turn", messages, cancelled))
            except (NativeCrashError, ResourceError):
                continue
            for event in events:
                self._deliver(event)

    def close(self) -> None:
        """End the child process."""
        self._closed = True
        self._worker.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def stopped(self, task: "asyncio.Task[None]") -> None:
        """Take notice that `run` has ended: by a bug, unless it was cancelled or had given up."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)

    def _check_open(self, queued: int) -> None:
        if self._closed:
            raise ClosedError
        if queued >= self._queue_size:
            raise BusyError

    def _admit(self) -> list[Ticket]:
        admitted = []
        while self._waiting and len(self._active) < self.facts.rows:
            ticket = self._waiting.popleft()
            self._active[ticket.id] = ticket
            admitted.append(ticket)
        return admitted

    def _expire(self) -> None:
        oldest = time.monotonic() - self._queue_timeout_s
        while self._waiting and self._waiting[0].submitted < oldest:
            self._waiting.popleft().events.put_nowait(ExpiredError())

    def _deliver(self, event: Event) -> None:
        ticket = self._active.get(event.id)  # type: ignore[call-overload]
        if ticket is None:
            return  # cancelled meanwhile
        if event.is_last:
            del self._active[ticket.id]
        if event.is_last or event.is_first or ticket.in_pieces:
            ticket.events.put_nowait(event)

    async def _call(self, work: Callable[[], Made]) -> Made:
        """Call the model in its thread; after a crash it is there again when this raises, or all has ended."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work)
        except RuntimeError as error:  # of ONNX Runtime, or a bug: a request may do it again, others have no part in it
            failure: LlmfastError = as_failure(error)
            is_crash = False
        except (NativeCrashError, ResourceError) as error:
            failure, is_crash = error, True
        try:
            await self._restart(failure, is_crash)
        except LlmfastError as fatal:
            self._end(fatal)
        raise failure

    async def _restart(self, error: LlmfastError, is_crash: bool) -> None:
        """Start another child; those that the old one was answering get its error.

        Raises:
            LlmfastError: it crashes too often, or can't be started.
        """
        note(f"note: {error.message}")
        active, self._active = list(self._active.values()), {}
        self._fail(active, error)
        self._cancelled.clear()
        now = time.monotonic()
        self._restarts = [*(then for then in self._restarts if then > now - _RESTART_WINDOW_S), now]
        if is_crash and len(self._restarts) > _MOST_RESTARTS:
            raise error
        self.restarted()
        await asyncio.sleep(_BACKOFF_S * 2 ** min(len(self._restarts) - 1, _MOST_RESTARTS))
        self._worker.close()
        self._worker = await asyncio.get_running_loop().run_in_executor(self._thread, self._open_worker)

    def _embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        found: tuple[list[list[float]], int] = self._worker.call("embed", texts)
        return found

    def _end(self, error: BaseException) -> None:
        self._closed, self.failure = True, self.failure or error
        self._fail([*self._active.values(), *self._waiting], NativeCrashError("the model can't be run any more"))
        self._active.clear()
        self._waiting.clear()
        self.give_up()

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        for ticket in tickets:
            ticket.events.put_nowait(error)
