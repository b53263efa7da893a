"""`llmfast doctor`: what this machine has, each provider proven by a graph that runs on it."""

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llmfast import registry
from llmfast.bench.machine import describe_machine
from llmfast.errors import LlmfastError
from llmfast.processor import saturates_int8
from llmfast.resources import available_memory
from llmfast.runtime import open_session, placement, usable_cores

SCHEMA_VERSION = 1
# Wheels that all install the package `onnxruntime`: the last one wins, and pieces of the others stay.
WHEELS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
    "ort-nightly",
    "ort-nightly-gpu",
)
# Bytes that each thread reads; above most caches.
_READ_BYTES = 128 * 2**20
_READS = 5
_UPDATE = "update its driver"


@dataclass(frozen=True)
class ProviderCheck:
    """Whether a provider works here.

    Attributes:
        name: in `llmfast.providers`.
        works: a small graph ran on it.
        detail: where its nodes ran, or what is missing.
        remedy: what to do, empty where nothing is.
    """

    name: str
    works: bool
    detail: str
    remedy: str


@dataclass(frozen=True)
class Extra:
    """Whether what an extra of llmfast needs is installed; `missing` says what is not, `remedy` what to do."""

    name: str
    installed: bool
    missing: list[str]
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What this machine has.

    Attributes:
        machine: as in a document of `bench`, with `all_cores`, `available_bytes`, `saturates_int8`, `read_bytes_per_s`.
        wheels: those installed that contain ONNX Runtime, with their versions.
        clash: what to do where several do, None otherwise.
        providers: each tried.
        extras: each looked for.
    """

    machine: dict[str, Any]
    wheels: dict[str, str]
    clash: str | None
    providers: list[ProviderCheck]
    extras: list[Extra]

    def document(self) -> dict[str, Any]:
        """Return what JSON can hold: `schema_version`, and the attributes of this and what it holds by their names."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def doctor() -> Diagnosis:
    """Find out what this machine has and can run."""
    machine = describe_machine()
    machine["all_cores"] = os.cpu_count()
    machine["available_bytes"] = available_memory()
    machine["saturates_int8"] = saturates_int8()
    machine["read_bytes_per_s"] = measure_read_bandwidth(usable_cores())
    wheels = installed(WHEELS)
    extras = list_extras(metadata.requires("llmfast") or [])
    return Diagnosis(machine, wheels, describe_clash(list(wheels)), try_providers(), extras)


def measure_read_bandwidth(threads: int) -> float:
    """Return the bytes per second that threads read together from memory: the best of a few tries.

    Each looks for the largest of float32 numbers, which NumPy does with vector instructions and without Python's lock.
    """
    arrays = [np.zeros(_READ_BYTES // 4, np.float32) for _ in range(threads)]
    for array in arrays:
        array[:] = 1  # pages that nobody wrote all read the same page of zeros
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_READS):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, threads * _READ_BYTES / (time.perf_counter() - start))
    return best


def installed(names: Sequence[str]) -> dict[str, str]:
    """Return name -> version of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_clash(wheels: Sequence[str]) -> str | None:
    """Return what to do about wheels that overwrite each other's files, None when there is at most one."""
    if len(wheels) < 2:
        return None
    kept = next((name for name in wheels if name != "onnxruntime"), wheels[0])
    return f"pip uninstall -y {' '.join(wheels)}, then pip install {kept}"


def try_providers() -> list[ProviderCheck]:
    """Run a small product on every provider, and say which ran it or what is missing."""
    found = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        onnx.save(_probe(), path)
        for name in registry.names("providers"):
            try:
                found.append(ProviderCheck(name, True, _run_probe(path, name), ""))
            except LlmfastError as error:
                found.append(ProviderCheck(name, False, error.message.replace(f" `{path}`", ""), error.hint or ""))
    return found


def list_extras(requirements: Sequence[str]) -> list[Extra]:
    """Say of each extra of llmfast but the one for its own development whether what it needs is installed.

    Args:
        requirements: as `importlib.metadata.requires` gives them.
    """
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        if match := re.match(r"([\w.-]+).*extra *== *['\"]([\w-]+)['\"]", requirement):
            extras.setdefault(match[2], []).append(match[1])
    found = []
    extras.pop("dev", None)
    for extra, names in extras.items():
        missing = [name for name in names if not installed([name])]
        remedy = f"pip install 'llmfast[{extra}]'" if missing else ""
        if extra == "cuda" and missing and installed(["onnxruntime"]):
            remedy = f"pip uninstall onnxruntime, then {remedy}"
        found.append(Extra(extra, not missing, missing, remedy))
    return found


def _probe() -> onnx.ModelProto:
    """Return a product of [2, 16] with a fixed matrix, of a fixed shape, since some providers take no other."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "probe",
        [value("x", TensorProto.FLOAT, [2, 16])],
        [value("y", TensorProto.FLOAT, [2, 16])],
        [numpy_helper.from_array(2 * np.eye(16, dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _run_probe(path: Path, provider: str) -> str:
    session = open_session(path, provider, threads=1)
    try:
        (result,) = session.run(None, {"x": np.ones((2, 16), np.float32)})
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        reason = str(error).strip().partition("\n")[0]
        raise LlmfastError(f"a product on {provider} fails: {reason}", _UPDATE) from error
    if not np.allclose(result, 2):
        raise LlmfastError(f"a product on {provider} is wrong", _UPDATE)
    return ", ".join(f"{nodes} of 1 node on {name}" for name, nodes in placement(session).items())
