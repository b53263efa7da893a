"""Check llmfast bench on this machine: a bundle against itself, and against itself with an injected delay.

    python scripts/check_bench.py BUNDLE [--runs 20] [--delay 0.05] [--max-time 30] [--data FILE --baseline FP32]

Of the runs against itself, 19 of 20 must end with no difference found. The delay is made from outside: the slow
copy's process is stopped for a share of every tenth of a second. With a text, measuring the divergence may take
1.15 times as long as the forward passes that it needs, and preparing a text 50 times as long no more memory. Exits
with 1 when a check fails.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bench import contestant
from llmfast.bench.machine import peak_rss_bytes
from llmfast.bench.metrics import divergence
from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bench.subject import Subject
from llmfast.bench.workload import SEQ_LEN
from llmfast.bundle import ModelBundle
from llmfast.worker import Worker

PERIOD_S = 0.1
FIGURE = "decode_tokens_per_s"
DELAYED_S = 100.0


class SlowWorker(Worker):
    """A worker that is stopped for a share of the time when it holds the candidate."""

    delay = 0.0
    candidate = Path()

    def __init__(self, target: str, path: Path, **settings: Any) -> None:
        super().__init__(target, path, **settings)
        self._stop = threading.Event()
        if SlowWorker.delay and path == SlowWorker.candidate:
            threading.Thread(target=self._brake, daemon=True).start()

    def close(self) -> None:
        if hasattr(self, "_stop"):
            self._stop.set()
        super().close()

    def _brake(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                os.kill(self.pid, signal.SIGSTOP)
                time.sleep(PERIOD_S * SlowWorker.delay)
                os.kill(self.pid, signal.SIGCONT)
            except ProcessLookupError:
                return


def run(bundle: Path, options: BenchOptions, delay: float) -> tuple[str, float, list[float], int, float]:
    """Return the verdict on decode, its ratio and interval, the rounds, and the seconds it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        candidate = Path(folder) / "candidate"
        candidate.symlink_to(bundle.resolve())
        SlowWorker.delay, SlowWorker.candidate = delay, candidate
        document = bench([bundle, candidate], options).document()
    row = document["rows"][1]
    found = (row["verdict"][FIGURE], row[f"{FIGURE}_ratio"], row[f"{FIGURE}_ratio_spread"])
    return *found, document["settings"]["rounds"], time.monotonic() - start


def cost_of_quality(bundles: tuple[Path, Path], data: Path, options: BenchOptions) -> float:
    """Return the time of comparing two bundles over some windows, as a share of their forward passes."""
    subjects = [Subject(bundle, threads=options.threads, max_length=SEQ_LEN) for bundle in bundles]
    windows = divergence.prepare(subjects[0].bundle, data, options)
    forward = 0.0

    def timed(score: Callable[[np.ndarray], np.ndarray], ids: np.ndarray) -> np.ndarray:
        nonlocal forward
        start = time.perf_counter()
        logits = score(ids)
        forward += time.perf_counter() - start
        return logits

    for subject in subjects:
        subject.engine.score = partial(timed, subject.engine.score)
    with tempfile.TemporaryDirectory() as folder:
        for number, window in enumerate(windows):
            if number == 1:  # the first one finds no page of memory in place
                forward, start = 0.0, time.perf_counter()
            for subject in subjects:
                subject.compare("divergence", window, Path(folder) / "reference.npy", subject is subjects[0])
    return (time.perf_counter() - start) / forward


def peak_memory(bundle: Path, data: Path, options: BenchOptions) -> int:
    """Return the peak memory of a process that has cut a text into windows, in bytes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_prepare, (bundle, data, options))


def _prepare(bundle: Path, data: Path, options: BenchOptions) -> int:
    divergence.prepare(ModelBundle.open(bundle), data, options)
    return peak_rss_bytes() or 0


def check_quality(bundle: Path, baseline: Path, data: Path, options: BenchOptions) -> bool:
    """Check what measuring quality costs in time and memory."""
    cost = cost_of_quality((baseline, bundle), data, options)
    print(f"quality takes {cost:.3f} times the forward passes")
    text = data.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        peaks = []
        for times in (1, 50):
            path = Path(folder) / f"{times}.txt"
            path.write_bytes(text * times)
            peaks.append(peak_memory(bundle, path, options))
    print(f"peak memory {peaks[0] / 1e6:.0f} MB with the text, {peaks[1] / 1e6:.0f} MB with 50 times as much")
    return cost <= 1.15 and peaks[1] <= 1.05 * peaks[0]


def spell(found: tuple[str, float, list[float], int, float]) -> str:
    """Return what `run` found as a line."""
    verdict, ratio, (low, high), rounds, seconds = found
    return f"{verdict} x{ratio:.3f} ({low:.3f} to {high:.3f}), {rounds} rounds, {seconds:.0f} s"


def main() -> int:
    """Run both checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--max-time", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-p", type=int, default=64)
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("--data", type=Path, help="text, for what quality costs")
    parser.add_argument("--baseline", type=Path, help="bundle that quality is measured against; the default is itself")
    options = parser.parse_args()
    contestant.Worker = SlowWorker
    settings = BenchOptions(
        prompt_tokens=options.p, output_tokens=options.n, max_time=options.max_time, threads=options.threads
    )
    is_cheap = options.data is None or check_quality(
        options.bundle,
        options.baseline or options.bundle,
        options.data,
        replace(settings, num_samples=8, seq_len=SEQ_LEN),
    )
    good = held = 0
    for number in range(options.runs):
        found = run(options.bundle, settings, 0.0)
        good += found[0] in ("equal", "inconclusive")
        held += found[2][0] <= 1 <= found[2][1]
        print(f"itself {number + 1}: {spell(found)}", flush=True)
    print(f"{good} of {options.runs} runs against itself found no difference, {held} intervals hold 1.00")
    settings = replace(settings, max_time=DELAYED_S)
    found = run(options.bundle, settings, options.delay)
    print(f"delayed by {options.delay:.0%}: {spell(found)}")
    return 0 if is_cheap and good >= 0.95 * options.runs and found[0] == "worse" else 1


if __name__ == "__main__":
    sys.exit(main())
