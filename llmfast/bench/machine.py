"""The machine a figure was measured on: a number without it is no result."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from llmfast import __version__
from llmfast.runtime import import_onnxruntime, usable_cores

# The instruction sets that decide which int8, int4 and bf16 kernels run.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimddp", "i8mm", "sve")
_CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, Any]:
    """Return CPU, memory, system and library versions, and the load average now."""
    cpuinfo = _read_cpuinfo(_CPUINFO)
    flags = f"{cpuinfo.get('flags', '')} {cpuinfo.get('Features', '')}".split()
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "isa": [flag for flag in _FLAGS if flag in flags],
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


def _read_cpuinfo(path: Path) -> dict[str, str]:
    """Return the fields of the first processor; none where there is no such file."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
