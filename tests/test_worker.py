"""Worker processes: answers, failures and deaths reach the parent as what they are."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llmfast.errors import InputError, NativeCrashError, ResourceError
from llmfast.worker import Worker


class Held:
    """What the tests hold in a child; it prints, fails and dies on request."""

    def __init__(self, value: int) -> None:
        self.value = value

    def add(self, number: int, *, loudly: bool = False) -> int:
        if loudly:
            os.write(1, b"noise on stdout")
        self.value += number
        return self.value

    def fail(self) -> None:
        raise InputError("what is wrong", "what to do")

    def stumble(self) -> None:
        {}["missing"]

    def die(self, number: int) -> None:
        os.kill(os.getpid(), number)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch):
    # The child runs isolated, so the tests' own folder must be put on its path.
    boot = f"import sys; sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r}); "
    monkeypatch.setattr("llmfast.worker._BOOT", boot + "from llmfast.worker import _serve; _serve()")
    with Worker("tests.test_worker:Held", 1) as held:
        yield held


def test_state_stays_in_the_child_and_noise_does_no_harm(worker: Worker) -> None:
    assert worker.call("add", 2) == 3
    assert worker.call("add", 3, loudly=True) == 6


def test_failures_cross_with_message_hint_and_exit_code(worker: Worker) -> None:
    with pytest.raises(InputError) as failure:
        worker.call("fail")
    assert (failure.value.message, failure.value.hint, failure.value.exit_code) == ("what is wrong", "what to do", 3)
    assert worker.call("add", 1) == 2  # and the worker lives on


def test_bugs_carry_the_traceback_of_the_child(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match=r"in stumble(.|\n)*KeyError"):
        worker.call("stumble")


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [
        (signal.SIGSEGV, NativeCrashError, "crashed with SIGSEGV"),
        (signal.SIGABRT, NativeCrashError, "crashed with SIGABRT"),
        (signal.SIGKILL, ResourceError, "out of memory"),
    ],
)
def test_death_is_told_by_its_signal(worker: Worker, number: int, error: type, reason: str) -> None:
    with pytest.raises(error, match=reason):
        worker.call("die", number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_a_whole_group_is_told_is_left_to_the_parent(worker: Worker, number: int) -> None:
    os.kill(worker.pid, number)
    assert worker.call("add", 1) == 2


def test_death_in_the_middle_of_an_answer_is_death(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, pickle, signal, sys\n"
        "pickle.load(sys.stdin.buffer)\n"
        "os.write(1, pickle.dumps((bytes(1 << 20), None))[:1000])\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setattr("llmfast.worker._BOOT", program)
    with pytest.raises(NativeCrashError, match="crashed with SIGSEGV"):
        Worker("tests.test_worker:Held", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_child_dies_with_its_parent() -> None:
    program = (
        "import os, signal\n"
        "from llmfast.worker import Worker\n"
        "held = Worker('llmfast.registry:names', 'tasks')\n"
        "print(held._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    child = int(result.stdout)
    for _ in range(100):
        time.sleep(0.05)
        try:
            os.kill(child, 0)
            with open(f"/proc/{child}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
    pytest.fail("the child outlived its parent")
