"""One pass of an encoder of images or sound, or of a module of no known task, on random inputs like its example inputs.

forward_s = median seconds of a run. Every round runs several times and takes the median: the first run finds the
caches as another model left them. The manifest holds shapes, types and ranges: one image, a second of sound.
"""

import numpy as np

from llmfast.bench.subject import Subject, Trial
from llmfast.bench.workload import SIGNAL_TASKS
from llmfast.example_inputs import random_inputs
from llmfast.report import Column

ORDER = 55
KIND = "speed"
TASKS = SIGNAL_TASKS
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
