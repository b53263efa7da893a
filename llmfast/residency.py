"""Mapped weight files: what a process holds of them is kept small while it computes.

Pages of a mapped file count as the memory of the process that touched them until the system needs them for something
else; one pass over a model touches all. Here they are given back as soon as they exceed a limit: they stay in the
system's page cache, so that the next touch costs a page fault and no reading.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIMIT_BYTES = 512 << 20
_INTERVAL_S = 0.01

Range = tuple[int, int]  # address and bytes


@contextmanager
def bounded_residency(path: Path, limit_bytes: int = _LIMIT_BYTES) -> Iterator[None]:
    """Keep what this process holds of mapped files near a limit while the body runs; Linux only, elsewhere it is idle.

    Args:
        path: the weight file, or the folder of several; what is not mapped yet is left alone.
        limit_bytes: pages are given back when the process holds more than this of all mapped files.
    """
    ranges = unchanged_mappings(path)
    if not ranges:
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(ranges, limit_bytes, done), daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def unchanged_mappings(path: Path) -> list[Range]:
    """Return where a file, or those of a folder, are mapped, as far as no page was changed: giving it back loses it."""
    if sys.platform != "linux":
        return []
    names = {str(file.resolve()) for file in (path.iterdir() if path.is_dir() else [path])}
    found: list[Range] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            candidate = (begin, end - begin) if rest[-1] in names else None
        elif first == "Anonymous:" and candidate and int(rest[0]) == 0:
            found.append(candidate)
    return found


def resident_file_bytes() -> int:
    """Return how much memory this process holds of mapped files."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


def _watch(ranges: list[Range], limit_bytes: int, done: threading.Event) -> None:
    madvise = ctypes.CDLL(None).madvise
    while not done.wait(_INTERVAL_S):
        if resident_file_bytes() > limit_bytes:
            for begin, length in ranges:
                madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
