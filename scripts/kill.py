"""Kill writers at random moments: python scripts/kill.py [KILLS [FOLDER]].

Each of export, quantize, tune and batch infer is killed a quarter of KILLS times (200), with `kill -9` on the whole
process group or on the parent alone, and goes on after every second time. Whatever the moment: inputs are as they
were, an output is absent or whole, and what is resumed ends with the bytes of a run that nobody disturbed.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from llmfast.verify import hash_files  # noqa: E402
from tests import tiny_decoder  # noqa: E402
from tests.conftest import ARCHITECTURES, write_checkpoint  # noqa: E402
from tests.tiny_tune import write_text  # noqa: E402

_TIMED = {"training.jsonl", "curves.svg"}  # files of tune that tell how long steps took


@dataclass
class Writer:
    """A command to kill.

    Attributes:
        arguments: of llmfast; the output is `{output}`.
        output: its name.
        resume: the folder that an interrupted run leaves, for `--resume`; empty when the same command goes on.
        check: refuses a half-written output.
    """

    arguments: list[str]
    output: str
    resume: str
    check: Callable[[Path, Path], None]


def _check_bundle(output: Path, whole: Path) -> None:
    assert {row["verdict"] for row in hash_files(output)} == {"ok"}
    _check_same(output, whole)


def _check_same(output: Path, whole: Path) -> None:
    assert _hash(output) == _hash(whole)


def _check_answers(output: Path, whole: Path) -> None:
    """A file of answers grows; its last line may be cut, and every other one must be an answer of the whole run."""
    *lines, last = output.read_bytes().split(b"\n")
    answers = whole.read_bytes().split(b"\n")
    assert set(lines) <= set(answers)
    assert any(answer.startswith(last) for answer in answers)


def _hash(path: Path) -> dict[str, str]:
    """Return the hash of a file, or of each file below a folder, by its name there."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    kept = [file for file in files if file.name not in _TIMED]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


def _has_state(left: Path) -> bool:
    """Return whether an interrupted run has come so far that it can be resumed; before, it just begins anew."""
    return any(file.suffix in (".pt", ".npz") for file in left.glob("*"))


def _start(writer: Writer, output: Path, *more: str) -> subprocess.Popen[bytes]:
    arguments = [argument.replace("{output}", str(output)) for argument in writer.arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmfast", *arguments, *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def _finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {errors.decode(errors='replace')}")


def _wait_for_group(group: int) -> None:
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise SystemExit("a child outlived its parent by 4 s")


def _torment(name: str, writer: Writer, inputs: Path, place: Path, kills: int, rng: random.Random) -> None:
    whole, output, before = place / f"whole-{writer.output}", place / "killed" / writer.output, _hash(inputs)
    output.parent.mkdir()
    started = time.monotonic()
    _finish(_start(writer, whole))
    duration_s = time.monotonic() - started
    counts = {"killed": 0, "ended before": 0, "output absent": 0, "output there": 0, "resumed": 0}
    left = output.parent / writer.resume
    while counts["killed"] < kills:
        more = ["--resume"] if writer.resume and _has_state(left) else []
        process = _start(writer, output, *more)
        time.sleep(rng.uniform(0, duration_s))
        with_children = rng.random() < 0.5
        (os.killpg if with_children else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        _wait_for_group(process.pid)
        counts["killed" if process.returncode == -signal.SIGKILL else "ended before"] += 1
        assert _hash(inputs) == before, "an input changed"
        counts["output there" if output.exists() else "output absent"] += 1
        if output.exists():
            writer.check(output, whole)
        is_done = output.exists() and writer.check is not _check_answers
        if counts["killed"] % 2 and not is_done:
            more = ["--resume"] if writer.resume and _has_state(left) else []
            counts["resumed"] += bool(more) or output.exists()
            _finish(_start(writer, output, *more))
            _check_same(output, whole)
            is_done = True
        if is_done:
            shutil.rmtree(output.parent)
            output.parent.mkdir()
    print(f"{name}, which takes {duration_s:.1f} s: {counts}", flush=True)


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    place = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="llmfast-kill-"))
    inputs = place / "inputs"
    (inputs / "decoder").mkdir(parents=True)
    checkpoint = write_checkpoint(inputs / "checkpoint", *ARCHITECTURES["llama-tied"])
    decoder = tiny_decoder.write_bundle(inputs / "decoder")
    text = write_text(inputs)
    prompts = inputs / "prompts.jsonl"
    rows = [{"id": str(index), "prompt": "x" * (index % 40 + 1)} for index in range(600)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibrated = ["--method", "gptq", "--calibration", str(text), "--num-samples", "2", "--seq-len", "32"]
    steps = ["--max-steps", "12", "--save-every", "2", "--batch-size", "2", "--threads", "1"]
    writers = {
        "export": Writer(["export", str(checkpoint), "-o", "{output}"], "bundle", "", _check_bundle),
        "quantize": Writer(
            ["quantize", str(decoder), "-o", "{output}", "--scheme", "int4", *calibrated, "--no-measure"],
            "bundle",
            ".bundle.llmfast-resume",
            _check_bundle,
        ),
        "tune": Writer(
            ["tune", str(checkpoint), "-o", "{output}", "--data", str(text), *steps, "--precision", "fp32"],
            "checkpoint",
            ".checkpoint.tune-resume",
            _check_same,
        ),
        "batch infer": Writer(
            ["infer", str(decoder), "--input", str(prompts), "-o", "{output}", "--max-tokens", "16", "--threads", "1"],
            "answers.jsonl",
            "",
            _check_answers,
        ),
    }
    rng = random.Random(0)
    for name, writer in writers.items():
        own = place / name.replace(" ", "-")
        own.mkdir()
        _torment(name, writer, inputs, own, kills // len(writers), rng)
    shutil.rmtree(place)


main()
