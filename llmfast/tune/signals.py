"""Ctrl-C and SIGTERM wait until a step is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmfast.supervisor import ask_for_grace

_SAVING_S = 300.0  # for the step under way and its checkpoint, when a signal ends the run


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM wait until a step is whole; a second one does not wait."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    ask_for_grace(_SAVING_S)
    before: dict[signal.Signals, Any] = {}

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        _restore(before)

    for watched in (signal.SIGINT, signal.SIGTERM):
        before[watched] = signal.signal(watched, remember)
    try:
        yield received
    finally:
        _restore(before)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
