"""A child process that holds one object and answers calls of its methods.

Measurements need a process of their own (peak memory, thread pools), and native code may crash:
the parent survives both, and learns of them as an exception. Messages are pickles on the child's
stdin and stdout; whatever a library prints in the child goes to stderr.
"""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from typing import Any

from llmfast.errors import LlmfastError, NativeCrashError, ResourceError
from llmfast.supervisor import die_with_parent

_BOOT = "from llmfast.worker import _serve; _serve()"


class Worker:
    """Run `module:Class(*args, **kwargs)` in a child process and call its methods.

    Example:
        with Worker("llmfast.bench.subject:Subject", path) as subject:
            subject.call("prefill", tokens=512)

    Raises:
        LlmfastError: as raised by the object.
        NativeCrashError: the child died in native code.
        ResourceError: the child was killed, as the kernel does when memory runs out.
        RuntimeError: anything else that the object raised; the message is the child's traceback.
    """

    def __init__(self, target: str, *args: Any, **kwargs: Any) -> None:
        self.target = target
        # -I: a `torch.py` in the current directory must not be imported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            self._request((target, args, kwargs))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the object and return its answer."""
        return self._request((method, args, kwargs))

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def close(self) -> None:
        """End the child process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, message: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            answer, failure = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:  # it may die in the middle of an answer
            raise self._death() from error
        if failure is not None:
            raise failure
        return answer

    def _death(self) -> LlmfastError:
        code = self._process.wait()
        what = f"worker `{self.target}`"
        if code == -signal.SIGKILL:
            return ResourceError(
                f"{what} was killed: the machine ran out of memory", "free memory or use a smaller model"
            )
        if code < 0:
            return NativeCrashError(f"{what} crashed with {signal.Signals(-code).name}", "the model may be malformed")
        return NativeCrashError(f"{what} ended with code {code}", "see the messages above")


def as_failure(error: RuntimeError) -> NativeCrashError:
    """Return what `Worker.call` can't tell from a bug as a failure of the model, for who goes on without it.

    Args:
        error: with the child's traceback; ONNX Runtime's exceptions share no class.
    """
    return NativeCrashError(f"the model failed: {str(error).strip().rpartition(chr(10))[2]}")


def _serve() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the child runs must neither read requests nor write answers
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole group; the parent decides, and kills
    die_with_parent()
    held: Any = None
    while True:
        try:
            name, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        answer: Any = None
        failure: BaseException | None = None
        try:
            if held is None:
                module, _, attribute = name.partition(":")
                held = getattr(importlib.import_module(module), attribute)(*args, **kwargs)
            else:
                answer = getattr(held, name)(*args, **kwargs)
        except LlmfastError as error:
            failure = error
        except MemoryError:
            failure = ResourceError("ran out of memory", "free memory or use a smaller model")
        except Exception:  # a bug: the parent raises it with the child's traceback
            failure = RuntimeError(traceback.format_exc())
        pickle.dump((answer, failure), answers)
        answers.flush()
