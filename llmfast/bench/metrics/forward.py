"""One pass of a module of no known task, on random inputs of the shapes and ranges of its example inputs.

forward_s = median seconds of a run. Every round runs several times and takes the median: the first run finds the
caches as another model left them. The manifest of an exported module holds shapes, types and ranges.
"""

import numpy as np

from llmfast.bench.inputs import random_inputs
from llmfast.bench.subject import Subject, Trial
from llmfast.bundle import UNKNOWN_TASK
from llmfast.report import Column

ORDER = 55
KIND = "speed"
TASKS = (UNKNOWN_TASK,)
NEEDS = ("example_inputs",)
HIGHER_IS_BETTER = {"forward_s": False}
COLUMNS = (
    Column("forward ms", "forward_s", lambda value: f"{value * 1e3:.2f}"),
    Column("x", "forward_s_ratio", lambda value: f"{value:.2f}"),
)

_REPEATS = 5


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return the median seconds of a run."""
    feeds = random_inputs(subject.bundle, trial.seed)
    return {"forward_s": float(np.median([_time_run(subject, feeds) for _ in range(_REPEATS)]))}


def _time_run(subject: Subject, feeds: dict[str, np.ndarray]) -> float:
    start = subject.clock()
    subject.session.run(None, feeds)
    return subject.clock() - start
