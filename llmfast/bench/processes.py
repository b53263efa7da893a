"""Which bundles are open at the same time: all, or where memory does not hold them, one for each turn."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, TracebackType
from typing import Any

from llmfast import report
from llmfast.bench.contestant import Contestant
from llmfast.bench.options import BenchOptions
from llmfast.bench.workload import Workload
from llmfast.resources import available_memory

# ONNX Runtime copies the weights of most layers into the order that its kernels like.
_BYTES_PER_STORED_BYTE = 2


class Processes:
    """The worker processes of a run; leaving the `with` ends them all.

    Args:
        contestants: the bundles.
        options: of the run.
        workload: says how long a cache must be.
        static: metrics of a bundle that is open, name -> plug-in.

    Attributes:
        one_at_a_time: memory holds no more.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        options: BenchOptions,
        workload: Workload,
        static: dict[str, ModuleType],
    ) -> None:
        self._contestants, self._options, self._workload, self._static = contestants, options, workload, static
        needed = sum(one.bundle.size_bytes for one in contestants) * _BYTES_PER_STORED_BYTE
        available = available_memory()
        self.one_at_a_time = len(contestants) > 1 and available is not None and needed > available
        if self.one_at_a_time:
            report.note(
                f"note: the models may take {needed / 1e9:.1f} GB, {(available or 0) / 1e9:.1f} GB are free: "
                "each is opened for its turn only, which takes longer"
            )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._contestants:
            one.stop()

    def open_all(self, advance: Callable[..., None]) -> None:
        """Open every bundle once, and learn what it is; leave them open if memory holds all."""
        for one in self._contestants:
            advance(0, f"opening {one.label}")
            one.attempt(partial(self.start, one))
            if self.one_at_a_time:
                self._describe(one)
                one.stop()
            advance(1)

    def start(self, one: Contestant, **settings: Any) -> None:
        """Open a bundle that is not open."""
        if one.worker is None:
            one.start(self._workload.max_length, self._options, is_batch=self._workload.is_batch, **settings)

    def turn(self, one: Contestant, work: Callable[[], None]) -> None:
        """Do something with a bundle that is open for as long as it takes."""
        is_done = one.attempt(partial(self.start, one)) and one.attempt(work)
        if self.one_at_a_time:
            if is_done:
                self._describe(one)
            one.stop()

    def describe_all(self) -> None:
        """File the static figures of the bundles that are open."""
        for one in self._contestants:
            if one.worker is not None:
                self._describe(one)

    def groups(self, baseline: Contestant) -> list[list[Contestant]]:
        """Return the bundles that can be open at the same time, the baseline first in each group."""
        others = [one for one in self._contestants if one is not baseline and one.failure is None]
        if self.one_at_a_time:
            return [[baseline, one] for one in others] or [[baseline]]
        return [[baseline, *others]]

    def _describe(self, one: Contestant) -> None:
        def describe() -> None:
            one.figures |= one.call("describe", list(self._static))

        if one.failure is None:
            one.attempt(describe)
