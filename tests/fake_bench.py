"""A benchmark without processes: fake engines on a fake clock."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmfast.bench import contestant as contestants
from llmfast.bench import subject as subjects
from llmfast.bench import watch
from llmfast.bench.subject import Subject
from tests.tiny_bench import make_table


class Clock:
    """Seconds that pass only when told so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeEngine:
    """A bigram model that takes known times."""

    def __init__(self, clock: Clock, table: np.ndarray, prefill_s: float, decode_s: float) -> None:
        self.clock, self.table, self.prefill_s, self.decode_s = clock, table, prefill_s, decode_s
        self.vocab_size = table.shape[1]
        self.note = ""
        self.capacity: int | None = None
        self.prompts: list[list[int]] = []
        self.session = SimpleNamespace()
        self.sessions = (self.session,)

    def reset(self) -> None: ...

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.prompts.append(ids.tolist())
        self.clock.now += self.prefill_s
        return self.table[ids[-1]]

    def decode(self, token: int) -> np.ndarray:
        self.clock.now += self.decode_s
        return self.table[token]

    def score(self, ids: np.ndarray) -> np.ndarray:
        assert self.capacity is None or len(ids) <= self.capacity
        return self.table[ids]


class Stage:
    """Engines by bundle name, and the calls that reached them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.engines: dict[str, FakeEngine] = {}
        self.calls: list[tuple[str, str]] = []
        self.closed: list[str] = []
        self.fail: Callable[[str, str], None] = lambda name, method: None

    def add(self, name: str, prefill_s: float = 0.5, decode_s: float = 0.25, table: np.ndarray | None = None) -> None:
        table = make_table(0) if table is None else table
        self.engines[name] = FakeEngine(self.clock, table, prefill_s, decode_s)


def make_stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Run subjects in this process, with fake engines and a fake clock."""
    stage = Stage()

    class InProcess:
        def __init__(self, target: str, path: Path, **settings: Any) -> None:
            assert target == "llmfast.bench.subject:Subject"
            self.name = path.name
            self.pid = 0  # of no process
            self.subject = Subject(path, clock=stage.clock, **settings)

        def call(self, method: str, *args: Any) -> Any:
            stage.calls.append((self.name, method))
            stage.fail(self.name, method)
            return getattr(self.subject, method)(*args)

        def close(self) -> None:
            stage.closed.append(self.name)

    def opener(bundle: Any, provider: str, threads: int, max_length: int | None, *_: Any) -> Any:
        engine = stage.engines[bundle.path.name]
        engine.capacity = max_length
        return lambda: (engine, engine.session)

    monkeypatch.setattr(contestants, "Worker", InProcess)
    monkeypatch.setattr(subjects, "settle", lambda: None)
    monkeypatch.setattr(watch, "_GLANCE_S", 0.0)
    monkeypatch.setattr(subjects, "opener", opener)
    monkeypatch.setattr(subjects, "placement", lambda *sessions: {"CPUExecutionProvider": 3})
    return stage
