"""The process that waits: signals that come when nobody expects them."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the supervisor needs fork")


def test_a_signal_right_behind_the_end_of_the_child_is_none() -> None:
    """Row D6: the handler runs when the child has been waited for, and the parent does not know yet."""
    program = (
        "import os, signal\n"
        "from llmfast import supervisor\n"
        "wait4 = os.wait4\n"
        "def late(*arguments):\n"
        "    found = wait4(*arguments)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    return found\n"
        "os.wait4 = late\n"
        "supervisor.supervise(lambda: print('done', flush=True))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_another_signal_does_not_put_off_the_end() -> None:
    program = (
        "import signal, time\n"
        "from llmfast import supervisor\n"
        "parent = supervisor._Parent(supervisor._Board())\n"
        "for now in (100.0, 103.0):\n"
        "    time.monotonic = lambda: now\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "print(parent._kill_at - supervisor.GRACE_S)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("100.0\n", "")
