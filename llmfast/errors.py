"""Failures a user can act on: one message, one hint, one exit code per kind."""


class LlmfastError(Exception):
    """A failure with a remedy.

    Args:
        message: `what is wrong with which file`, lower case, no full stop.
        hint: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["LlmfastError"], tuple[str, str]]:
        return type(self), (self.message, self.hint)  # crosses the border of a worker process whole


class OptionError(LlmfastError):
    """An impossible option or combination of options."""

    exit_code = 2


class InputError(LlmfastError):
    """A file that is missing, truncated, malformed or inconsistent."""

    exit_code = 3


class UnsafeInputError(LlmfastError):
    """A file that is refused because reading it could run code or leave its folder."""

    exit_code = 4


class UnsupportedError(LlmfastError):
    """A sound input that llmfast, or the installed ONNX Runtime, can't handle."""

    exit_code = 5


class ResourceError(LlmfastError):
    """Disk, memory or time ran out."""

    exit_code = 6


class GateError(LlmfastError):
    """A measured quality or speed misses what was asked."""

    exit_code = 7


class OutputExistsError(LlmfastError):
    """The output is already there, or someone else is writing it."""

    exit_code = 8


class NativeCrashError(LlmfastError):
    """A worker process died inside native code."""

    exit_code = 9
