"""Foreign programs, such as chat templates, run in a child process that may take little time and memory."""

import contextlib
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from llmfast.errors import InputError, LlmfastError, ResourceError

MAX_S = 2.0
MAX_BYTES = 64 << 20


def run_limited(function: Callable[[], Any], what: str, max_s: float = MAX_S, max_bytes: int = MAX_BYTES) -> Any:
    """Call a function in a forked child, and return its answer.

    Without fork (Windows) it runs here, without limits; the memory limit is Linux's.

    Args:
        function: pure Python; what it returns can be pickled.
        what: its name in messages.
        max_s: seconds it may take.
        max_bytes: memory it may take beside what this process has, and the size of its answer.

    Raises:
        InputError: it failed; the message is its exception's.
        ResourceError: it took too long, or too much memory.
    """
    if not hasattr(os, "fork"):
        return _answer(*_attempt(function), what)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads hold no lock that the child needs
        child = os.fork()
    if child == 0:
        _run_child(function, writing, max_bytes)
    os.close(writing)
    try:
        content = _read_until(reading, time.monotonic() + max_s, max_bytes)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if content is None:
        raise ResourceError(f"{what} takes more than {max_s:g} s or {max_bytes >> 20} MiB", "it may be made to")
    try:
        succeeded, answer = pickle.loads(content)
    except (EOFError, pickle.UnpicklingError) as error:  # killed before it could say a word
        raise ResourceError(f"{what} takes more than {max_bytes >> 20} MiB", "it may be made to") from error
    return _answer(succeeded, answer, what)


def _attempt(function: Callable[[], Any]) -> tuple[bool | None, Any]:
    try:
        return True, function()
    except MemoryError:
        return None, ""
    except LlmfastError as error:
        return False, error
    except Exception as error:  # a foreign program may fail in any way
        return False, str(error)[:200] or type(error).__name__


def _answer(succeeded: bool | None, answer: Any, what: str) -> Any:
    if succeeded is None:
        raise ResourceError(f"{what} takes more than {MAX_BYTES >> 20} MiB", "it may be made to")
    if isinstance(answer, LlmfastError):
        raise answer
    if not succeeded:
        raise InputError(f"{what}: {answer}")
    return answer


def _run_child(function: Callable[[], Any], pipe: int, max_bytes: int) -> None:
    """Answer through the pipe, and end without running anything that the parent registered."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory(max_bytes)
        content = pickle.dumps(_attempt(function))
        while content:
            content = content[os.write(pipe, content) :]
    finally:
        os._exit(0)


def _limit_memory(max_bytes: int) -> None:
    if sys.platform == "linux":
        import resource

        with open("/proc/self/status") as file:
            now = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (now + max_bytes, hard))


def _read_until(pipe: int, deadline: float, max_bytes: int) -> bytes | None:
    """Return what comes through a pipe until it is closed, None when that is too late or too much."""
    import select

    content = bytearray()
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        block = os.read(pipe, 1 << 16)
        if not block:
            return bytes(content)
        content += block
        if len(content) > max_bytes:
            return None
