"""Rows D: the machine, the disk and the command's surroundings. Those that need more than one run are in tests."""

import os
import shutil
from typing import Any

from llmfast.resources import MAX_MEMORY
from tests.faults import graphs
from tests.faults.table import Place, fault, quantize


@fault("D1", 6, "free at", "--force")
def disk_too_small(place: Place) -> list[Any]:
    usage = shutil.disk_usage(place.folder)
    place.patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    return quantize(graphs.save(place.folder / "model"), place)


@fault("D1", 0, writes=True)
def disk_too_small_and_forced(place: Place) -> list[Any]:
    usage = shutil.disk_usage(place.folder)
    place.patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    return ["--force", *quantize(graphs.save(place.folder / "model"), place)]


@fault("D2", 6, "cannot write to", "/file`")
def output_below_a_file(place: Place) -> list[Any]:
    return ["quantize", graphs.save(place.folder / "model"), "-o", place.write("file", b"") / "x", "--scheme", "int8"]


def _little_memory(place: Place, available: int) -> None:
    group = place.folder.parent / "cgroup"
    group.mkdir()
    for name, text in (("memory.max", available), ("memory.current", 0), ("memory.stat", "inactive_file 0")):
        (group / name).write_text(f"{text}\n")
    place.patch.setattr("llmfast.resources._CGROUP", group)


@fault("D9", 6, "a KV cache of 96 tokens needs", "available", "--max-tokens")
def cache_too_large(place: Place) -> list[Any]:
    _little_memory(place, 10_000)
    place.patch.setattr("llmfast.runtime.require_memory", lambda *_: None)
    return ["infer", place.decoder, "-p", "x" * 90]


@fault("D9", 6, "model.onnx` needs", "available")
def model_too_large(place: Place) -> list[Any]:
    _little_memory(place, 10_000)
    return ["infer", place.decoder, "-p", "x"]


@fault("D9", 0)
def model_too_large_and_forced(place: Place) -> list[Any]:
    _little_memory(place, 10_000)
    return ["--force", "infer", place.decoder, "-p", "x", "--max-tokens", 1]


@fault("D9", 6, "model.onnx` needs", "available")
def model_larger_than_allowed(place: Place) -> list[Any]:
    place.patch.setenv(MAX_MEMORY, f"10000 {os.getpid()}")  # as --max-memory does in the process that it limits
    return ["infer", place.decoder, "-p", "x"]


@fault("D10", 8, "output exists", "--overwrite")
def output_exists(place: Place) -> list[Any]:
    existing = place.own(place.decoder, "existing")
    return ["quantize", place.decoder, "-o", existing, "--scheme", "int8", "--no-measure"]


@fault("D10", 8, "not an llmfast bundle")
def output_is_something_else(place: Place) -> list[Any]:
    place.write("thesis/chapter.txt", "years of work")
    arguments = ["--scheme", "int8", "--no-measure", "--overwrite"]
    return ["quantize", place.decoder, "-o", place.folder / "thesis", *arguments]


@fault(
    "D11",
    2,
    "overlaps the input",
    each={"same": "model", "inside": "model/new", "parent": ".", "dots": "model/../model", "link": "link"},
)
def output_is_input(place: Place, output: str) -> list[Any]:
    model = place.own(place.decoder)
    (place.folder / "link").symlink_to("model")
    return ["quantize", model, "-o", place.folder / output, "--scheme", "int8", "--overwrite"]


@fault(
    "D14",
    0,
    alone=True,
    each={
        "spaces": "a b  c",
        "accents": "é日本語🚀",
        "decomposed": "e\u0301",
        "newline": "a\nb",
        "dash": "-rf",
        "markup": "[red]x[/]",
        "long": "n" * 255,
        "long-wide": "é" * 127,
    },
)
def path(place: Place, name: str) -> list[Any]:
    model = place.own(place.decoder, name)
    return ["infer", model, "-p", "x", "--max-tokens", 1]


@fault("D14", 5, "not UTF-8", alone=True)  # ONNX Runtime's own limit
def path_of_bytes(place: Place) -> list[Any]:
    return ["infer", place.own(place.decoder, os.fsdecode(b"caf\xe9")), "-p", "x"]


@fault("D14", 0, each={"long": "n" * 255, "long-wide": "é" * 127}, alone=True, writes=True)
def output_path(place: Place, name: str) -> list[Any]:
    return ["quantize", place.decoder, "-o", place.output / name, "--scheme", "int8", "--no-measure"]


@fault("D15", 2, "--threads", each={"0": 0, "negative": -1, "million": 10**6})
def threads(place: Place, count: int) -> list[Any]:
    return ["infer", place.decoder, "-p", "x", "--threads", count]


@fault("D17", 0)
def clock_goes_back(place: Place) -> list[Any]:
    times = iter(range(10**9, 0, -1))
    place.patch.setattr("time.time", lambda: float(next(times)))
    place.patch.setenv("TZ", "Antarctica/Troll")
    return ["infer", place.decoder, "-p", "x", "--max-tokens", 2]


@fault("D18", 5, "pip install 'llmfast[export]'")
def extra_missing(place: Place) -> list[Any]:
    import importlib.util

    find = importlib.util.find_spec
    place.patch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    return ["export", place.checkpoint(), "-o", place.output]
