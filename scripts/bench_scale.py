"""Measure `infer --engine ray` on this machine: workers against one, against the local engine, and who hands out lines.

    python scripts/bench_scale.py BUNDLE --prompts 200 --rounds 3 --price-per-hour 0.1

Prompts are pieces of a text (the calibration text that llmfast ships, or --data), of 64 to 256 tokens, continued by up
to 64. The ways are interleaved: the local engine with as many threads as there are workers, one worker of one thread,
and --workers of one thread each. Prints the median seconds of each, from the first line handed out to the last answer
(Ray starts before, the model opens within), the ratios, what the best way makes a million and a billion such prompts
cost, and how many lines per second one process reads, hands out and writes when answering takes no time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmfast import quantize
from llmfast.bundle import ModelBundle
from llmfast.infer.cluster import pool
from llmfast.infer.cluster.run import ClusterOptions, answer_folder
from llmfast.infer.jsonl import Line
from llmfast.text import read_text
from llmfast.tokenizer import Tokenizer

_TEXT = Path(quantize.__file__).parent / "texts" / "calibration.txt"
_ECHOED_LINES = 100_000


class Echo:
    """A worker that answers every prompt at once, with itself."""

    def __init__(self, *_: object) -> None:
        """Take the arguments of a worker, and need none."""

    def start(self) -> None:
        """Open nothing."""

    def answer(self, lines: list[Line]) -> list[dict[str, Any]]:
        """Return each prompt as its answer."""
        return [{"answer": line.fields["prompt"], "prompt_tokens": 0, "generated_tokens": 0} for line in lines]

    def figures(self) -> dict[str, Any]:
        """Return nothing worth counting."""
        return {"texts_per_s": 0.0}


def write_prompts(path: Path, bundle: ModelBundle, text: str, count: int) -> None:
    """Write prompts of random lengths from random places of a text."""
    import numpy as np

    tokenizer = Tokenizer.load(bundle.path)
    ids = tokenizer.encode(text, add_special_tokens=False)
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = int(rng.integers(64, 257))
            start = int(rng.integers(0, max(1, len(ids) - length)))
            file.write(json.dumps({"prompt": tokenizer.decode(ids[start : start + length])}) + "\n")


def answer(bundle: Path, prompts: Path, folder: Path, new_tokens: int, *options: str) -> dict[str, Any]:
    """Answer the prompts with the command line, and return its summary."""
    output = folder / ("out" if "ray" in options else "out.jsonl")
    command = [sys.executable, "-m", "llmfast", "infer", str(bundle), "--input", str(prompts), "--output", str(output)]
    command += ["--raw", "--max-tokens", str(new_tokens), "--overwrite", "--format", "json", *options]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure_driver(bundle: Path, folder: Path, workers: int) -> float:
    """Return the lines per second that one process reads, hands to workers that answer at once, and writes."""
    path = folder / "many.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(_ECHOED_LINES):
            file.write(json.dumps({"prompt": f"{number} " + "a prompt of some length, " * 20}) + "\n")
    pool.Actor = Echo  # type: ignore[misc,assignment]
    summary = answer_folder(bundle, str(path), str(folder / "many"), ClusterOptions(workers=workers, threads=1))
    assert summary.answered == _ECHOED_LINES
    return summary.answered / summary.seconds


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=_TEXT, help="text that the prompts are cut from")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--price-per-hour", type=float, default=0.1, help="of this machine")
    arguments = parser.parse_args()
    workers = str(arguments.workers)
    ways = {
        f"local, {workers} threads": ("--threads", workers),
        "ray, 1 worker of 1 thread": ("--engine", "ray", "--workers", "1", "--threads", "1"),
        f"ray, {workers} workers of 1 thread": ("--engine", "ray", "--workers", workers, "--threads", "1"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as temporary:
        folder = Path(temporary)
        prompts = folder / "prompts.jsonl"
        bundle = ModelBundle.open(arguments.bundle)
        write_prompts(prompts, bundle, read_text(arguments.data), arguments.prompts)
        for _ in range(arguments.rounds):
            for name, options in ways.items():
                summary = answer(arguments.bundle, prompts, folder, arguments.new_tokens, *options)
                assert summary["answered"] == arguments.prompts
                seconds[name].append(summary["seconds"])
        lines_per_s = measure_driver(arguments.bundle, folder, arguments.workers)
    local, one, many = (statistics.median(found) for found in seconds.values())
    read, new = summary["prompt_tokens"], summary["generated_tokens"]
    print(f"{arguments.prompts} prompts, {read} tokens; {new} generated")
    for name, found in seconds.items():
        median = statistics.median(found)
        shown = {"seconds": [round(one, 2) for one in found], "tokens_per_s": round(new / median, 1)}
        print(json.dumps({"way": name, **shown, "prompts_per_s": round(arguments.prompts / median, 3)}))
    print(f"{workers} workers against one: {one / many:.2f}x; against the local engine: {local / many:.2f}x")
    best = arguments.prompts / min(local, many)
    for name, count in (("million", 1e6), ("billion", 1e9)):
        hours = count / best / 3600
        print(f"a {name} prompts: {hours:,.0f} hours of this machine, {hours * arguments.price_per_hour:,.2f} in money")
    machines = lines_per_s / best
    print(f"one process reads, hands out, writes {lines_per_s:,.0f} lines/s: what {machines:,.0f} such machines answer")


if __name__ == "__main__":
    main()
