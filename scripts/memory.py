"""Print the peak memory and the time of exporting and quantizing a large model, process by process. Linux only.

    python scripts/memory.py FOLDER [--layers 11 22]

Makes TinyLlama's architecture (1.1 billion parameters with 22 layers) with random bfloat16 weights in FOLDER, one shard
per layer, runs `llmfast export` and `llmfast quantize --scheme int4` on it, and removes what it made. 22 layers take
6.7 GB of disk while they are compared with PyTorch. Peaks are those of the kernel (VmHWM); pages of mapped files are
part of them, "anonymous" (sampled) is what could not be dropped at any time. Seconds are those of the processor, all
processes of a command together, which a busy machine changes least.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from random_llama import make_checkpoint

INTERVAL_S = 0.02


def main() -> None:
    """Run both commands for every depth, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[11, 22])
    arguments = parser.parse_args()
    print("| layers | parameters | command | CPU s | process | peak MB | anonymous MB |\n|--:|--:|---|--:|---|--:|--:|")
    for layers in arguments.layers:
        folder = arguments.folder / f"llama-{layers}"
        checkpoint, fp32, int4 = (folder / name for name in ("checkpoint", "fp32", "int4"))
        try:
            parameters = make_checkpoint(checkpoint, layers)
            for command in (["export", checkpoint, "-o", fp32], ["quantize", fp32, "-o", int4, "--scheme", "int4"]):
                seconds, peaks = run(["llmfast", *map(str, command)])
                for process, (peak, anonymous) in peaks.items():
                    print(
                        f"| {layers} | {parameters / 1e9:.2f} B | {command[0]} | {seconds:.1f} | {process} "
                        f"| {peak / 1e6:.0f} | {anonymous / 1e6:.0f} |",
                        flush=True,
                    )
                if command[0] == "export":
                    shutil.rmtree(checkpoint)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run(command: list[str]) -> tuple[float, dict[str, tuple[int, int]]]:
    """Run a command; return its processor seconds, and of each process the peak bytes, all and anonymous ones."""
    start = children_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    known: dict[int, tuple[int, int]] = {}
    names: dict[int, str] = {}
    while process.poll() is None:
        for pid in (process.pid, *children(process.pid)):
            if status := read_status(pid):
                known[pid] = (status["VmHWM"], max(status["RssAnon"], known.get(pid, (0, 0))[1]))
                names[pid] = name_of(pid, process.pid) or names.get(pid, "")
        time.sleep(INTERVAL_S)
    seconds = children_seconds() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read()}")
    return seconds, {names[pid]: peaks for pid, peaks in known.items() if names[pid]}  # others ended at once


def children_seconds() -> float:
    """Return the processor time of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def read_status(pid: int) -> dict[str, int]:
    """Return the memory of a process in bytes, nothing when it is over."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    if "VmHWM" not in fields:  # it is ending
        return {}
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon")}


def name_of(pid: int, parent: int) -> str:
    """Return what a process is for, by the libraries that it has loaded; nothing before that."""
    if pid == parent:
        return "llmfast"
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""
    if "libtorch_cpu" in maps:
        return "PyTorch, to compare"
    return "ONNX Runtime" if "onnxruntime" in maps else ""


if __name__ == "__main__":
    if not os.path.isdir("/proc/self/task"):
        sys.exit("this script reads /proc, which Linux alone has")
    main()
