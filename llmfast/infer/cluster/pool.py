"""Workers on a Ray cluster, and who answers what: chunks of lines to workers, and again when a worker dies.

Plain actors, not a pipeline of Ray Data: a batch that goes on from one block to the next, parts that a run which was
cut off goes on with, and rows that are tried elsewhere without those beside them all need to know what each worker
is doing. A chunk's answers are taken once, when its call returns; the calls of a worker that died never do. So no
line is lost, and none is answered twice.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmfast.cluster import connect, gpus, inherited, living_nodes, needs_gpu, processors
from llmfast.errors import LlmfastError, NativeCrashError, OptionError
from llmfast.infer.cluster.parts import Part
from llmfast.infer.cluster.worker import LineWorker, Outcome
from llmfast.infer.jsonl import Line
from llmfast.report import note

# A chunk whose workers died so often is given up; before the last time it goes alone, so that its neighbours are not
# given up with it.
_MOST_DEATHS = 3
# Workers that die in a row, beside their number, before the run ends.
_DEATHS_IN_A_ROW = 3
_WAIT_S = 10.0
_PER_WINDOW = 8


@dataclass(eq=False)
class Chunk:
    """Lines that go to a worker together.

    Attributes:
        lines: of one part.
        part: where their answers go.
        deaths: workers that died with it.
    """

    lines: Sequence[Line]
    part: Part
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    actor: Any
    is_ready: bool = False
    chunks: dict[Any, Chunk] = field(default_factory=dict)  # by the reference of what they will be


class Actor:
    """A worker in a process of its own; what it can't open is told by `start`, as Ray has no words of a constructor's.

    Args:
        arguments: of `LineWorker`.
    """

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def start(self) -> None:
        self._worker = LineWorker(*self._arguments)

    def answer(self, lines: Sequence[Line]) -> list[Outcome]:
        return self._worker.answer(lines)

    def figures(self) -> dict[str, Any]:
        return self._worker.figures()


@dataclass(frozen=True)
class Plan:
    """How many workers, and what each has of its machine.

    Attributes:
        workers: processes with a model each.
        threads: of each.
        neighbours: workers on one machine, at most.
    """

    workers: int
    threads: int
    neighbours: int


def plan_workers(cpus: Sequence[int], workers: int | None, threads: int | None) -> Plan:
    """Divide the processors of machines among workers.

    Args:
        cpus: processors of each machine.
        workers: None is one for each machine.
        threads: of a worker; None divides the processors.

    Raises:
        OptionError: below 1.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise OptionError(f"--{name} {value}: must be at least 1")
    machines = [count for count in cpus if count] or [1]
    workers = workers or len(machines)
    threads = threads or max(1, min(*machines, sum(machines) // workers))
    neighbours = max(1, min(workers, max(machines) // threads))
    return Plan(workers, threads, neighbours)


class Pool:
    """Workers of a cluster.

    Args:
        address: of the cluster; None starts one on this machine, and ends it with the pool.
        workers: None is one for each machine.
        threads: of a worker; None divides the processors.

    Attributes:
        plan: how many workers with how many threads.
        deaths: workers that died.
    """

    def __init__(self, address: str | None, workers: int | None, threads: int | None) -> None:
        self._ray = connect(address)
        self.deaths = 0
        try:
            nodes = living_nodes(self._ray)
            cpus = [processors(node) for node in nodes]
            self._has_gpus = any(gpus(node) for node in nodes)
            self.plan = plan_workers(cpus, workers, threads)
            room = sum(count // self.plan.threads for count in cpus)
            if address is None and room < self.plan.workers:
                raise OptionError(
                    f"{self.plan.workers} workers of {self.plan.threads} threads do not fit this machine",
                    f"it has room for {room}; on others with --address",
                )
        except BaseException:
            self.close()
            raise
        self._make: Callable[[], Any]
        self._workers: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        self._again: deque[Chunk] = deque()
        self._suspects: deque[Chunk] = deque()
        self._deaths_in_a_row = 0

    def open(
        self,
        model: Path,
        digest: str,
        provider: str,
        batch_size: int | None,
        window: int,
        options: Mapping[str, Any],
    ) -> None:
        """Start the workers; returns when the first one is there.

        Args:
            model: bundle directory, at the same place on all machines.
            digest: of model and options.
            provider: a name in `llmfast.providers`, or several that are tried in their order.
            batch_size: prompts at once; None chooses by the memory.
            window: lines that go through a model together.
            options: of `infer` that hold for all lines.

        Raises:
            LlmfastError: a worker can't run the model.
        """
        self.chunk_lines = max(1, window // _PER_WINDOW)
        # Enough to fill the rows, and two chunks for those that fall free meanwhile.
        self._depth = -(-window // self.chunk_lines) + 2
        settings = {"num_cpus": self.plan.threads, "max_concurrency": self._depth + 1} | inherited()
        is_gpu_wanted = needs_gpu(provider) and (self._has_gpus or "," not in provider)
        if is_gpu_wanted:
            settings["num_gpus"] = 1
        actor = self._ray.remote(Actor).options(scheduling_strategy="SPREAD", max_restarts=0, **settings)
        arguments = model, digest, provider, self.plan.threads, batch_size, self.plan.neighbours, dict(options)
        self._make = lambda: actor.remote(*arguments)
        for _ in range(self.plan.workers):
            self._start_worker()
        is_told, begin = False, time.monotonic()
        while not any(worker.is_ready for worker in self._workers):
            self._wait(_WAIT_S)
            if time.monotonic() - begin > _WAIT_S and not is_told:
                is_told = True
                free = f"{self.plan.threads} free processor{'s' if self.plan.threads > 1 else ''}"
                gpu = " and a free GPU" if is_gpu_wanted else ""
                note(f"note: waiting for a first worker: it needs {free}{gpu} of one machine")

    def answers(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Outcome]]]:
        """Yield each chunk once, with the answer to each of its lines or the reason why there is none.

        Raises:
            LlmfastError: a worker can't run the model.
            NativeCrashError: workers die one after the other.
        """
        while True:
            for worker in self._workers:
                while (chunk := self._next_for(worker, chunks)) is not None:
                    worker.chunks[worker.actor.answer.remote(chunk.lines)] = chunk
            if not (self._again or self._suspects or any(worker.chunks for worker in self._workers)):
                return
            yield from self._wait(None)

    def figures(self) -> list[dict[str, Any]]:
        """Return what each worker that is there has done."""
        calls = [worker.actor.figures.remote() for worker in self._workers if worker.is_ready]
        found = []
        for call in calls:
            with contextlib.suppress(self._ray.exceptions.RayError):  # it died after its last answer
                found.append(self._ray.get(call, timeout=_WAIT_S))
        return found

    def close(self) -> None:
        """Leave the cluster; the workers end, and a cluster that was started here ends too."""
        self._ray.shutdown()

    def _next_for(self, worker: _Worker, chunks: Iterator[Chunk]) -> Chunk | None:
        if not worker.is_ready or len(worker.chunks) >= self._depth:
            return None
        if any(chunk.deaths >= _MOST_DEATHS - 1 for chunk in worker.chunks.values()):
            return None  # it is alone with that one
        if self._again:
            return self._again.popleft()
        if (chunk := next(chunks, None)) is not None:
            return chunk
        return self._suspects.popleft() if self._suspects and not worker.chunks else None

    def _wait(self, timeout_s: float | None) -> list[tuple[Chunk, list[Outcome]]]:
        """Wait for something to happen, and return the chunks that are done by it."""
        calls = {call: worker for worker in self._workers for call in worker.chunks} | self._starting
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=timeout_s)
        done: list[tuple[Chunk, list[Outcome]]] = []
        for call in ready:
            worker = calls[call]
            try:
                outcomes = self._ray.get(call)
            except self._ray.exceptions.RayTaskError as error:
                cause: Exception = error.cause
                if isinstance(cause, LlmfastError):
                    raise cause from None
                done += self._bury(worker, f"failed: {cause!r}")
            except self._ray.exceptions.RayActorError:
                done += self._bury(worker, "died")
            else:
                if call in self._starting:
                    self._starting.pop(call).is_ready = True
                else:
                    self._deaths_in_a_row = 0
                    done.append((worker.chunks.pop(call), outcomes))
        return done

    def _start_worker(self) -> None:
        worker = _Worker(self._make())
        self._workers.append(worker)
        self._starting[worker.actor.start.remote()] = worker

    def _bury(self, worker: _Worker, how: str) -> list[tuple[Chunk, list[Outcome]]]:
        """Start a worker in place of one that died, and queue its chunks again; return those that are given up."""
        with contextlib.suppress(Exception):  # a machine out of reach may come back, and is not wanted any more
            self._ray.kill(worker.actor)
        self._workers.remove(worker)
        self._starting = {call: other for call, other in self._starting.items() if other is not worker}
        self.deaths += 1
        self._deaths_in_a_row += 1
        lost = list(worker.chunks.values())
        lines = sum(len(chunk.lines) for chunk in lost)
        note(f"note: a worker {how}; its {lines} lines are answered by others")
        if self._deaths_in_a_row > _DEATHS_IN_A_ROW + self.plan.workers:
            raise NativeCrashError("workers die one after the other", "try the model with `llmfast infer --prompt`")
        given_up: list[tuple[Chunk, list[Outcome]]] = []
        for chunk in lost:
            chunk.deaths += 1
            if chunk.deaths >= _MOST_DEATHS:
                error = NativeCrashError(f"{chunk.deaths} workers died while answering it")
                given_up.append((chunk, [error] * len(chunk.lines)))
            elif chunk.deaths == _MOST_DEATHS - 1:
                self._suspects.append(chunk)
            else:
                self._again.append(chunk)
        self._start_worker()
        return given_up
