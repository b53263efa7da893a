"""One forward pass of an encoder on random token ids: latency, its percentiles, and texts per second, for every shape.

Every round runs a shape several times and takes the median, and the 95th percentile of the runs. Tokenization is
left out; pooling is part of the graph.
"""

import numpy as np

from llmfast.bench.encoding import time_encoder
from llmfast.bench.subject import Subject, Trial
from llmfast.bench.workload import ENCODER_TASKS
from llmfast.report import Column

ORDER = 50
KIND = "speed"
TASKS = ENCODER_TASKS
NEEDS = ("vocab_size",)
HIGHER_IS_BETTER = {"latency_s_{shape}": False, "latency_p95_s_{shape}": False, "samples_per_s_{shape}": True}
COLUMNS = (
    Column("{shape} ms", "latency_s_{shape}", lambda value: f"{value * 1e3:.1f}"),
    Column("{shape} samples/s", "samples_per_s_{shape}", lambda value: f"{value:.1f}"),
    Column("x", "samples_per_s_{shape}_ratio", lambda value: f"{value:.2f}"),
)


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return, for every shape, the median and 95th percentile of a run, and the samples per second of the median."""
    figures = {}
    for shape, (batch, _) in trial.shapes.items():
        latencies = time_encoder(subject, trial, shape).latencies_s
        subject.latencies[f"latency_s_{shape}"] = list(latencies)
        latency = float(np.median(latencies))
        figures[f"latency_s_{shape}"] = latency
        figures[f"latency_p95_s_{shape}"] = float(np.percentile(latencies, 95))
        figures[f"samples_per_s_{shape}"] = batch / latency
    return figures
