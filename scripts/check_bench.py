"""Check llmfast bench on this machine: a bundle against itself, and against itself with an injected delay.

    python scripts/check_bench.py BUNDLE [--runs 20] [--delay 0.05] [--max-time 30]

Of the runs against itself, 19 of 20 must end with no difference found. The delay is made from outside: the slow
copy's process is stopped for a share of every tenth of a second. Exits with 1 when either check fails.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmfast.bench import contestant
from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
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
        document = bench([bundle, candidate], options)
    row = document["rows"][1]
    found = (row["verdict"][FIGURE], row[f"{FIGURE}_ratio"], row[f"{FIGURE}_ratio_spread"])
    return *found, document["settings"]["rounds"], time.monotonic() - start


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
    options = parser.parse_args()
    contestant.Worker = SlowWorker
    settings = BenchOptions(
        prompt_tokens=options.p, output_tokens=options.n, max_time=options.max_time, threads=options.threads
    )
    good = 0
    for number in range(options.runs):
        found = run(options.bundle, settings, 0.0)
        good += found[0] in ("equal", "inconclusive")
        print(f"itself {number + 1}: {spell(found)}", flush=True)
    print(f"{good} of {options.runs} runs against itself found no difference")
    settings = replace(settings, max_time=DELAYED_S)
    found = run(options.bundle, settings, options.delay)
    print(f"delayed by {options.delay:.0%}: {spell(found)}")
    return 0 if good >= 0.95 * options.runs and found[0] == "worse" else 1


if __name__ == "__main__":
    sys.exit(main())
