"""What is slow to open stays open while the same model is used again and again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Opened = TypeVar("Opened")

_open: dict[Any, Any] | None = None


@contextmanager
def keeping() -> Iterator[None]:
    """Within the body, and in bodies within it, functions marked `kept` give the same arguments the same result."""
    global _open
    before = _open
    _open = {} if before is None else before
    try:
        yield
    finally:
        _open = before


def kept(function: Callable[Parameters, Opened]) -> Callable[Parameters, Opened]:
    """Let `keeping` keep what a function opens; its arguments must be hashable."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Opened:
        if _open is None:
            return function(*args, **kwargs)
        key = function, args, tuple(sorted(kwargs.items()))
        if key not in _open:
            _open[key] = function(*args, **kwargs)
        found: Opened = _open[key]
        return found

    return call
