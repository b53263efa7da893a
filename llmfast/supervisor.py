"""The process that survives: it runs the command in a child, and outlives what native code does there.

`llmfast` forks before anything heavy is imported, which takes a few milliseconds. The child runs the command; the
parent waits, passes signals on, and when native code kills the child it says so, removes what was staged and exits
with 9. Without fork (Windows) the command runs in the one process.

The child leaves notes for the parent in memory they share: which paths are staged, what native code is about to do,
how long it may take to end after a signal, and the most time and memory that the user allows it.
"""

import contextlib
import math
import mmap
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from llmfast import report
from llmfast.errors import LlmfastError, NativeCrashError, ResourceError, UnsupportedError
from llmfast.resources import memory_of, spell_bytes

GRACE_S = 5.0  # for unwinding after a signal; a native call that takes longer is cut off
_TWICE_S = 0.5  # two signals within this are one, told by the parent and by whoever sent it
_TICK_S = 0.1  # how often the parent looks at its clock and the child's memory
_BOARD_BYTES, _DOING_BYTES = 1 << 16, 1 << 10
_NUMBERS = struct.Struct("ddd")


class _Board:
    """Notes that outlive the process that writes them."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BOARD_BYTES + _NUMBERS.size)
        self.numbers = (GRACE_S, math.inf, math.inf)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Seconds the child may take to end after a signal, seconds it may run, bytes of memory it may hold."""
        grace_s, timeout_s, max_bytes = _NUMBERS.unpack_from(self._memory, _BOARD_BYTES)
        return grace_s, timeout_s, max_bytes

    @numbers.setter
    def numbers(self, numbers: tuple[float, float, float]) -> None:
        _NUMBERS.pack_into(self._memory, _BOARD_BYTES, *numbers)

    @property
    def doing(self) -> str:
        """What native code was about to do."""
        return os.fsdecode(self._memory[:_DOING_BYTES].rstrip(b"\0"))

    @doing.setter
    def doing(self, what: str) -> None:
        self._memory[:_DOING_BYTES] = os.fsencode(what)[:_DOING_BYTES].ljust(_DOING_BYTES, b"\0")

    @property
    def staged(self) -> list[str]:
        """Paths that are there until their content is published."""
        return [os.fsdecode(path) for path in self._memory[_DOING_BYTES:_BOARD_BYTES].split(b"\0") if path]

    def add(self, path: str) -> None:
        """Note a staged path, and forget those that are gone."""
        content = b"\0".join(os.fsencode(known) for known in [path, *self.staged] if os.path.lexists(known))
        room = _BOARD_BYTES - _DOING_BYTES
        self._memory[_DOING_BYTES:_BOARD_BYTES] = content[:room].ljust(room, b"\0")


_board: _Board | None = None


def supervise(command: Callable[[], None]) -> None:
    """Run a command in a child process, and exit as it does.

    Raises:
        SystemExit: always, with the child's exit code, or that of its death.
    """
    if not hasattr(os, "fork"):
        command()
        return
    board = _Board()
    parent = _Parent(board)
    child = os.fork()
    if child == 0:
        _begin_as_child(board)
        command()
        return
    status, peak_bytes = parent.wait(child)
    code = os.waitstatus_to_exitcode(status)
    for path in board.staged:  # a child that ended by itself has published or removed them
        _remove(Path(path))
    error = parent.failure
    if code < 0 and not parent.signal and error is None:
        error = _death(-code, board.doing, peak_bytes)
    if code and error is not None:  # a child that got through all the same has succeeded
        report.complain(error)
        code = error.exit_code
    sys.exit(code if code >= 0 else 128 + parent.signal)


def tell_staged(path: Path) -> None:
    """Let the parent remove `path`, which exists, should this process die."""
    if _board is not None:
        _board.add(os.path.abspath(path))


def tell_doing(what: str) -> None:
    """Say what native code is about to do, for the message should it crash."""
    if _board is not None:
        _board.doing = what


def ask_for_grace(seconds: float) -> None:
    """Let this process take longer to end after a signal: for work that must be finished, or saved."""
    if _board is not None:
        _board.numbers = (seconds, *_board.numbers[1:])


def limit(timeout_s: float | None, max_bytes: float | None) -> None:
    """Let the parent end this process when it takes more time, or when it and its children hold more memory.

    What is counted is memory of their own, not pages of mapped files, which the system takes back when it needs them.

    Raises:
        UnsupportedError: there is no parent that watches, or the system does not tell what a process holds.
    """
    if timeout_s is None and max_bytes is None:
        return
    if _board is None or (max_bytes is not None and memory_of(os.getpid()) is None):
        raise UnsupportedError("--timeout and --max-memory cannot be kept on this system", "Linux can do both")
    _board.numbers = (_board.numbers[0], timeout_s or math.inf, max_bytes or math.inf)


class Echo:
    """Tells a second signal from the first one's echo: the parent passes on what a whole group was told."""

    def __init__(self) -> None:
        self._heard_at = -math.inf

    def hears(self) -> bool:
        """Return whether the signal that has just come is an echo."""
        before, self._heard_at = self._heard_at, time.monotonic()
        return self._heard_at - before <= _TWICE_S


def die_with_parent() -> None:
    """Let the kernel end this process when its parent is gone."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _Parent:
    """Waits for the child, passes signals on, and keeps the limits.

    Args:
        board: says how long the child may take to end, and its limits.

    Attributes:
        signal: the signal to exit with, 0 for none.
        failure: the limit that the child was ended for.
    """

    def __init__(self, board: _Board) -> None:
        self.signal = 0
        self.failure: LlmfastError | None = None
        self._board = board
        self._child = 0
        self._started = time.monotonic()
        self._kill_at = math.inf
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP, a script's `&` SIGINT, and mean it
                signal.signal(number, self._pass_on)
        signal.signal(signal.SIGALRM, self._look)

    def wait(self, child: int) -> tuple[int, int]:
        """Return the child's wait status, and the most memory it had, in bytes."""
        self._child = child
        if self.signal:  # it came before there was a child
            self._send(self.signal)
        signal.setitimer(signal.ITIMER_REAL, _TICK_S, _TICK_S)
        _, status, usage = os.wait4(child, 0)
        self._child = 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        return status, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # a handler may run right behind wait4
            os.kill(self._child, number)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        self._kill_at = min(self._kill_at, time.monotonic() + self._board.numbers[0])
        if self._child and not (number == signal.SIGINT and _is_in_foreground()):  # a terminal tells both of Ctrl-C
            self._send(number)

    def _look(self, *_: object) -> None:
        """End the child when its time is over, or its memory too much."""
        if not self._child:
            return
        now = time.monotonic()
        grace_s, timeout_s, max_bytes = self._board.numbers
        if now > self._kill_at:
            self._send(signal.SIGKILL)
        elif self.signal or self.failure:
            return
        elif now - self._started > timeout_s:
            self.failure = _over(f"--timeout {timeout_s:g}", self._board.doing, "allow more time")
            self._kill_at = now + grace_s
            self._send(signal.SIGTERM)
        elif max_bytes < math.inf and (held := memory_of(self._child) or 0) > max_bytes:
            what = f"--max-memory {spell_bytes(int(max_bytes))}"
            self.failure = _over(what, f"{self._board.doing}, with {spell_bytes(held)}", "allow more memory")
            self._send(signal.SIGKILL)  # at once: it may be taking more


def _over(limit: str, doing: str, hint: str) -> ResourceError:
    return ResourceError(f"over {limit} while {doing}", f"{hint}, or use a smaller model")


def _is_in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _begin_as_child(board: _Board) -> None:
    global _board
    _board = board
    die_with_parent()
    echo = Echo()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not echo.hears():
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    handlers: dict[int, Callable[[int, FrameType | None], None]] = {
        signal.SIGINT: interrupt,
        signal.SIGTERM: _terminate,
        signal.SIGHUP: _terminate,
    }
    for number, handler in handlers.items():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _terminate(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent passes on what a whole group was told
    sys.exit(128 + signal.SIGTERM)  # unwinds the stack, so that staged output is removed


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _death(number: int, doing: str, peak_bytes: int) -> LlmfastError:
    where = f" while {doing}" if doing else ""
    if number == signal.SIGKILL:
        return ResourceError(
            f"ran out of memory{where}: the system killed the process, which had {peak_bytes / 2**30:.1f} GiB at most",
            "free memory or use a smaller model",
        )
    return NativeCrashError(f"native code crashed with {_spell(number)}{where}", "the model may be malformed")


def _spell(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
