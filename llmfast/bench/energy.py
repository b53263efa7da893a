"""Energy: hardware counters where they can be read, otherwise an estimate from CPU time that says so.

RAPL counts a whole processor package, NVML a whole GPU: on a shared machine they count the others' work too.
"""

import ctypes
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAPL = "rapl"
NVML = "nvml"
ESTIMATE = "estimate: CPU time x {watts:g} W per core"

# https://docs.kernel.org/power/powercap/powercap.html: microjoules that wrap at max_energy_range_uj.
_POWERCAP = Path("/sys/class/powercap")
_NVML_LIBRARY = "libnvidia-ml.so.1"
_ON_NVIDIA = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}


@dataclass(frozen=True)
class EnergyMeter:
    """A count of joules that only grows.

    Attributes:
        source: `rapl`, `nvml`, or `estimate: ...`.
        read: joules so far; only differences mean something.
    """

    source: str
    read: Callable[[], float]


def open_meter(
    providers: Collection[str],
    watts_per_core: float,
    cpu_time: Callable[[], float] = time.process_time,
    powercap: Path = _POWERCAP,
) -> EnergyMeter:
    """Return the best meter there is for a model.

    Args:
        providers: ONNX Runtime's names of those that run its nodes; CUDA's and TensorRT's ask the GPU's counter.
        watts_per_core: of a core at work, for the estimate.
        cpu_time: CPU seconds of this process, all threads.
        powercap: where Linux shows RAPL.
    """
    on_gpu = not _ON_NVIDIA.isdisjoint(providers)
    if on_gpu and (gpu := _open_nvml(os.environ.get("CUDA_VISIBLE_DEVICES", "0"))):
        return EnergyMeter(NVML, gpu)
    if not on_gpu and (packages := _rapl_packages(powercap)):
        return EnergyMeter(RAPL, lambda: sum(package.joules() for package in packages))
    return EnergyMeter(ESTIMATE.format(watts=watts_per_core), lambda: cpu_time() * watts_per_core)


class _Package:
    """One processor package's counter, unwrapped."""

    def __init__(self, folder: Path) -> None:
        self._counter = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._read()
        self._total = 0

    def joules(self) -> float:
        now = self._read()
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6

    def _read(self) -> int:
        return int(self._counter.read_text())


def _rapl_packages(powercap: Path) -> list[_Package]:
    """Return the packages; none where the counters are missing or only root may read them."""
    try:
        return [_Package(folder) for folder in sorted(powercap.glob("*-rapl:*")) if folder.name.count(":") == 1]
    except (OSError, ValueError):
        return []


def _open_nvml(visible: str) -> Callable[[], float] | None:
    """Return what reads a GPU's counter (Volta and later), None where there is none.

    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html

    Args:
        visible: `CUDA_VISIBLE_DEVICES`, of which sessions run on the first: a number in the order of the PCI bus, as
            with CUDA_DEVICE_ORDER=PCI_BUS_ID, or a UUID.
    """
    name = visible.partition(",")[0].strip()
    try:
        library: Any = ctypes.CDLL(_NVML_LIBRARY)
    except OSError:
        return None
    device, count = ctypes.c_void_p(), ctypes.c_ulonglong()

    def joules() -> float:
        library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(count))
        return count.value / 1e3

    def find() -> int:
        if name.isdecimal():
            return int(library.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(device)))
        return int(library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(device)))

    succeeded = (
        library.nvmlInit_v2() == 0
        and find() == 0
        and library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(count)) == 0
    )
    return joules if succeeded else None
