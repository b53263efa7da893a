"""The machine a figure was measured on: a number without it is no result."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from llmfast import __version__
from llmfast.processor import instruction_sets, processor_name
from llmfast.runtime import import_onnxruntime, usable_cores


def describe_machine() -> dict[str, Any]:
    """Return CPU, memory, system and library versions, and the load average now."""
    return {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "isa": instruction_sets(),
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "onnxruntime": import_onnxruntime().__version__,
        "numpy": np.__version__,
        "llmfast": __version__,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def peak_rss_bytes() -> int | None:
    """Return the most memory this process has held since it began, None where the system does not say.

    `VmHWM`, not `getrusage`: the latter also counts what the parent held before the child was started.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
