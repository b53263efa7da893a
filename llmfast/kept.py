"""What is slow to open stays open while the same model is used again and again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Opened = TypeVar("Opened")

# Of each thread its own: what one keeps must not last as long as another.
_open: ContextVar[dict[Any, Any] | None] = ContextVar("open", default=None)


@contextmanager
def keeping() -> Iterator[None]:
    """Within the body and bodies within it, in one thread, functions marked `kept` give the same arguments the same
    result."""
    before = _open.get()
    token = _open.set({} if before is None else before)
    try:
        yield
    finally:
        _open.reset(token)


def kept(function: Callable[Parameters, Opened]) -> Callable[Parameters, Opened]:
    """Let `keeping` keep what a function opens; its arguments must be hashable."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Opened:
        if (opened := _open.get()) is None:
            return function(*args, **kwargs)
        key = function, args, tuple(sorted(kwargs.items()))
        if key not in opened:
            opened[key] = function(*args, **kwargs)
        found: Opened = opened[key]
        return found

    return call
