"""Let batch infer answer prompts for a while, and see what grows: python scripts/soak.py [MINUTES [BUNDLE]].

Prints resident memory per 1,000 requests, as the slope of a line through the samples after the first fifth of the
time, and how many file descriptors and threads there were. The default is 20 minutes of a tiny random decoder.
Exits with 1 when memory grows by more than 1 MiB per 1,000 requests, or when descriptors are not constant.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny_decoder  # noqa: E402

_EVERY_S = 5.0
_MOST_MIB = 1.0  # per 1,000 requests
_ANSWER_TOKENS = 48
_LINES_A_MINUTE = 80_000  # more than a tiny model answers


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _state(process: int) -> tuple[float, int, int]:
    """Return resident memory in MiB, file descriptors and threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    resident = float(status["VmRSS"].split()[0]) / 1024
    return resident, len(os.listdir(f"/proc/{process}/fd")), int(status["Threads"])


def _count_lines(path: Path, start: int) -> tuple[int, int]:
    """Return how many lines there are behind an offset, and the offset behind them."""
    if not path.exists():
        return 0, start
    with path.open("rb") as file:
        file.seek(start)
        count = 0
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            start += len(block)
    return count, start


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    with tempfile.TemporaryDirectory(prefix="llmfast-soak-") as made:
        place = Path(made)
        (place / "decoder").mkdir()
        bundle = Path(sys.argv[2]) if len(sys.argv) > 2 else tiny_decoder.write_bundle(place / "decoder")
        with (place / "prompts.jsonl").open("w") as file:
            for index in range(int(minutes * _LINES_A_MINUTE)):
                file.write(json.dumps({"prompt": "word " * (index % 7 + 1)}) + "\n")
        answers = place / "answers.jsonl"
        command = [sys.executable, "-m", "llmfast", "infer", str(bundle), "--input", str(place / "prompts.jsonl")]
        command += ["-o", str(answers), "--max-tokens", str(_ANSWER_TOKENS)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        samples, requests, offset = [], 0, 0
        start = time.monotonic()
        end = start + 60 * minutes
        while time.monotonic() < end and process.poll() is None:
            time.sleep(_EVERY_S)
            new, offset = _count_lines(answers, offset)
            requests += new
            if new and process.poll() is None:
                samples.append((requests, *_state(_children(process.pid)[0])))
        took = (time.monotonic() - start) / 60
        process.send_signal(signal.SIGTERM)  # SIGINT is ignored where a script runs this with `&`
        code = process.wait()
    if len(samples) < 10:
        raise SystemExit(f"{len(samples)} samples of {_EVERY_S:g} s: too few to tell")
    settled = np.array(samples[len(samples) // 5 :])
    slope = float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0]) * 1000
    print(f"{requests:,} requests in {took:.1f} min, exit code {code} after SIGTERM")
    print(f"memory {settled[0, 1]:.1f} -> {settled[-1, 1]:.1f} MiB: {slope:+.4f} MiB per 1,000 requests")
    descriptors, threads = (sorted({int(value) for value in settled[:, column]}) for column in (2, 3))
    print(f"file descriptors {descriptors}, threads {threads}")
    if slope > _MOST_MIB or len(descriptors) > 1:
        raise SystemExit(1)


main()
