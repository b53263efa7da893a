"""Who takes turns in `compare.py`: a process that speaks the protocol of `protocol.py`, and what came of it."""

import contextlib
import json
import os
import random
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
OPEN_LIMIT, TURN_LIMIT = 1800, 600  # seconds: to convert and open a model, and to answer once


@dataclass(frozen=True)
class Workload:
    """Read a prompt of random tokens, then take so many steps: these are timed if there are any, else the prompt is."""

    name: str
    prompt: int
    steps: int

    @property
    def context(self) -> int:
        """Positions that are needed."""
        return self.prompt + self.steps + 1

    def draw(self, rng: random.Random, vocab_size: int) -> dict[str, Any]:
        """Return a request for new random tokens."""
        return {"ids": [rng.randrange(vocab_size) for _ in range(self.prompt)], "tokens": self.steps + 1}

    def speed(self, reply: dict[str, Any]) -> float:
        """Return tokens per second."""
        seconds = reply["seconds"]
        return self.steps / sum(seconds[1:]) if self.steps else self.prompt / seconds[0]


@dataclass(frozen=True)
class Batch:
    """Answer many prompts of random tokens, of lengths between two bounds, with so many tokens each."""

    name: str
    prompts: int
    shortest: int
    longest: int
    steps: int

    @property
    def context(self) -> int:
        """Positions that are needed."""
        return self.longest + self.steps

    def draw(self, rng: random.Random, vocab_size: int) -> dict[str, Any]:
        """Return a request for new random tokens."""
        lengths = [rng.randint(self.shortest, self.longest) for _ in range(self.prompts)]
        return {"batch": [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths], "tokens": self.steps}

    def speed(self, reply: dict[str, Any]) -> float:
        """Return generated tokens per second of the whole time, prompts included."""
        return float(self.prompts * self.steps / reply["seconds"])


@dataclass
class Contestant:
    """A peer with one format, or a bundle of llmfast.

    Attributes:
        name: as the tables print it.
        command: starts its script; empty when there is none to start.
        log: what it prints on standard error.
        ours: it is a bundle of llmfast.
        failure: why it does not run (any more).
        hello: what its script said first.
        speeds: workload -> tokens per second of each round.
        quality: figures against the reference, with the names that `llmfast bench` gives them.
        unscored: why it has no quality, where that was asked for.
    """

    name: str
    command: list[str]
    log: Path
    ours: bool = False
    failure: str | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    speeds: dict[str, list[float]] = field(default_factory=dict)
    quality: dict[str, float | None] = field(default_factory=dict)
    unscored: str | None = None
    process: subprocess.Popen[str] | None = None

    def open(self, threads: int) -> None:
        """Start the script, which converts the model the first time, and wait until it is ready."""
        settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=SCRIPTS,
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.hello = self._read(OPEN_LIMIT) or {}

    def run(self, workload: Workload | Batch, request: dict[str, Any], is_warmup: bool) -> None:
        """Take a turn; a contestant that fails keeps the reason and takes no more."""
        reply = self._ask(request)
        if reply is not None and "reason" not in reply and not is_warmup:
            self.speeds.setdefault(workload.name, []).append(workload.speed(reply))

    def score(self, ids: list[int], file: Path) -> str | None:
        """Save the logits after each token to a file; return why that can't be."""
        reply = self._ask({"ids": ids, "logits": str(file)})
        return self.failure if reply is None else reply.get("reason")

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone, which reading tells
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read(TURN_LIMIT)

    def _read(self, limit: float) -> dict[str, Any] | None:
        """Return the next reply; None, and a failure, when the process ended or took too long."""
        assert self.process is not None
        assert self.process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), self.close()))
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return dict(json.loads(line))
        self.process.wait()
        said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        reason = said[-1] if said else f"ended with {self.process.returncode}"
        self.failure = f"no answer in {limit:.0f} s" if late.is_set() else f"{reason} ({self.log})"
        return None
