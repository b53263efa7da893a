"""Seconds from the start of the process to the first token of a short prompt, as the shell sees it.

    python scripts/time_to_first_token.py BUNDLE [--runs 5] [--threads N]

Each run is a new process; the clock stops at the first byte of its answer. The first run is not counted: it fetches
the files from the disk. CPU seconds, of the whole process, say more on a busy machine.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time


def first_token_s(command: list[str]) -> float:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        message = process.stderr.read().decode(errors="replace")
    if process.returncode or not first.strip():
        sys.exit(f"no answer: {message}")
    return seconds


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads")
    options = parser.parse_args()
    command = [sys.executable, "-m", "llmfast", "infer", options.bundle, "--prompt", options.prompt]
    command += ["--max-tokens", "4", *(["--threads", options.threads] if options.threads else [])]
    first_token_s(command)
    before = _cpu_s()
    seconds = [first_token_s(command) for _ in range(options.runs)]
    cpu = (_cpu_s() - before) / options.runs
    spelled = ", ".join(f"{one:.2f}" for one in seconds)
    print(f"process start to first token: {statistics.median(seconds):.2f} s (median of {spelled}); {cpu:.2f} s of CPU")


if __name__ == "__main__":
    main()
