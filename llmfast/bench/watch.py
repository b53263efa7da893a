"""What else the machine did while it was measured: other processes, a hypervisor, throttling, swapping.

Read from /proc and /sys (https://docs.kernel.org/filesystems/proc.html); where they are missing nothing is said.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# Above these shares of the machine's time the other processes take part in the figures: at the beginning, of which a
# moment is seen, and during the rounds. The load average says neither: it remembers what has long ended.
_BUSY_GLANCE = 0.25
_BUSY_SHARE = 0.10
_STOLEN_SHARE = 0.02
# Pages of 4 KiB that went to disk or came back: 4 MiB.
_SWAPPED_PAGES = 1024

_GLANCE_S = 0.5


@dataclass(frozen=True)
class Snapshot:
    """Counters of the machine, all of them growing.

    Attributes:
        busy: CPU ticks at work, of all cores.
        total: CPU ticks.
        stolen: CPU ticks that a hypervisor gave to others.
        swapped: pages moved to or from swap.
        throttled: times that a core was slowed down because it was hot.
    """

    busy: int
    total: int
    stolen: int
    swapped: int
    throttled: int

    @classmethod
    def take(cls, root: Path = Path("/")) -> "Snapshot | None":
        """Read the counters; None where the system has none."""
        try:
            ticks = [int(word) for word in (root / "proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            events = dict(line.split() for line in (root / "proc/vmstat").read_text().splitlines())
        except (OSError, ValueError):
            return None
        user, nice, system, idle, waiting, irq, softirq, stolen = ticks
        busy = user + nice + system + irq + softirq
        swapped = int(events.get("pswpin", 0)) + int(events.get("pswpout", 0))
        throttles = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        throttled = sum(int(file.read_text()) for file in throttles)
        return cls(busy, busy + idle + waiting + stolen, stolen, swapped, throttled)


class Watch:
    """Compares the machine at the beginning and at the end of the speed rounds.

    Args:
        before: counters at the beginning, None where there are none.
        warnings: what the beginning was like already.
    """

    def __init__(self, before: Snapshot | None, warnings: list[str]) -> None:
        self._before, self._warnings, self._own = before, warnings, _own_ticks([os.getpid()])

    @classmethod
    def start(cls, take: Callable[[], "Snapshot | None"] = Snapshot.take) -> "Watch":
        """Look at the machine for a moment, and begin.

        Args:
            take: reads the counters.
        """
        first, own = take(), _own_ticks([os.getpid()])
        time.sleep(_GLANCE_S)
        before = take()
        share = _others(first, before, _own_ticks([os.getpid()]) - own)
        warnings = []
        if share > _BUSY_GLANCE:
            warnings.append(
                f"the machine is busy: other processes use {share:.0%} of its time; expect noisy speed figures"
            )
        return cls(before, warnings)

    def finish(self, workers: Iterable[int]) -> list[str]:
        """Return what to warn of.

        Args:
            workers: process ids of the bundles.
        """
        return self._warnings + describe_change(
            self._before, Snapshot.take(), _own_ticks([os.getpid(), *workers]) - self._own
        )


def describe_change(before: Snapshot | None, after: Snapshot | None, own: int) -> list[str]:
    """Return what to warn of between two snapshots.

    Args:
        before: the first.
        after: the second.
        own: CPU ticks that this program and its workers used in between.
    """
    if before is None or after is None or after.total <= before.total:
        return []
    warnings = []
    others = _others(before, after, own)
    if others > _BUSY_SHARE:
        warnings.append(f"other processes used {others:.0%} of the machine's time during the rounds")
    stolen = _share(before, after, "stolen")
    if stolen > _STOLEN_SHARE:
        warnings.append(f"the hypervisor gave {stolen:.0%} of the machine's time to others during the rounds")
    if after.throttled > before.throttled:
        warnings.append(f"the processor was throttled {after.throttled - before.throttled} times: it ran hot")
    if after.swapped - before.swapped > _SWAPPED_PAGES:
        moved = (after.swapped - before.swapped) * 4096 / 1e6
        warnings.append(f"the machine swapped {moved:.0f} MB: memory is too small for this run")
    return warnings


def _others(before: Snapshot | None, after: Snapshot | None, own: int) -> float:
    """Return the share of the machine's time that processes but these used; 0 where nobody knows."""
    if before is None or after is None or after.total <= before.total:
        return 0.0
    return max(0.0, after.busy - before.busy - own) / (after.total - before.total)


def _share(before: Snapshot | None, after: Snapshot | None, counter: str) -> float:
    if before is None or after is None or after.total <= before.total:
        return 0.0
    return float(getattr(after, counter) - getattr(before, counter)) / (after.total - before.total)


def _own_ticks(processes: Iterable[int]) -> int:
    """Return the CPU ticks of some processes, those of ended children included."""
    ticks = 0
    for pid in processes:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks
