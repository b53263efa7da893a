"""What this process may use of memory and disk, and whether that is enough; asked before the work begins."""

import os
import shutil
from pathlib import Path

from llmfast.errors import ResourceError

# Set by `llmfast --force`, and inherited by worker processes.
FORCE = "LLMFAST_FORCE"
# Set by `llmfast --max-memory`: bytes, and the process that may hold them with its children, who inherit it.
MAX_MEMORY = "LLMFAST_MAX_MEMORY"
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_memory() -> int | None:
    """Return the bytes that can be had without swapping: what the machine, a cgroup or the user's limit leaves.

    None if unknown.
    """
    limits = [_machine_memory(), _cgroup_memory(), _allowed_memory()]
    return min((limit for limit in limits if limit is not None), default=None)


def allow_memory(size: int) -> None:
    """Let this process and its children plan with so many bytes together."""
    os.environ[MAX_MEMORY] = f"{size} {os.getpid()}"


def is_forced() -> bool:
    """Return whether the user insists on work that may not fit."""
    return bool(os.environ.get(FORCE))


def require_memory(need: int, what: str, hint: str = "") -> None:
    """Refuse work for which memory is too small, unless the user insists.

    Args:
        need: bytes, at least.
        what: what needs them.
        hint: how to need fewer.

    Raises:
        ResourceError: the message says how much is needed and how much there is.
    """
    have = available_memory()
    if have is not None and need > have and not is_forced():
        raise ResourceError(
            f"{what} needs {spell_bytes(need)} of memory, {spell_bytes(have)} are available",
            hint or "free memory, use a smaller model, or try all the same with `llmfast --force ...`",
        )


def require_disk(folder: Path, need: int, what: str) -> None:
    """Refuse work whose output does not fit on the disk, unless the user insists.

    Args:
        folder: where it will be written; need not exist yet.
        need: bytes, at least.
        what: what needs them.

    Raises:
        ResourceError: the message says how much is needed and how much there is.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    have = shutil.disk_usage(place).free
    if need > have and not is_forced():
        raise ResourceError(
            f"{what} needs about {spell_bytes(need)}, {spell_bytes(have)} are free at `{place}`",
            "make room, choose another -o, or try all the same with `llmfast --force ...`",
        )


def memory_of(process: int) -> int | None:
    """Return the bytes that a process and its children hold, pages of mapped files aside; None where nobody tells."""
    root = Path(f"/proc/{process}")
    try:
        status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines())
        held = sum(int(status[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem") if name in status)
        children = [child for task in (root / "task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, ValueError):  # it has ended, or this is not Linux
        return None
    return held + sum(memory_of(int(child)) or 0 for child in children)


def _machine_memory() -> int | None:
    try:
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    except (OSError, StopIteration, ValueError):  # not Linux
        return None


def _cgroup_memory() -> int | None:
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        reclaimable = next(
            int(line.split()[1])
            for line in (_CGROUP / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, StopIteration, ValueError):  # no cgroup v2, or no limit (`max`)
        return None
    return max(0, limit - used + reclaimable)


def _allowed_memory() -> int | None:
    if not (allowance := os.environ.get(MAX_MEMORY)):
        return None
    size, process = map(int, allowance.split())
    return max(0, size - (memory_of(process) or 0))


def spell_bytes(size: int) -> str:
    """Return a size in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
