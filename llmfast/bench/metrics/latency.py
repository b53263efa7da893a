"""One forward pass of an encoder on random token ids: median latency, and texts per second, for every shape.

Every round runs a shape several times and takes the median: the first run finds the caches as another
model left them. Tokenization is left out; pooling is part of the graph.
"""

import numpy as np

from llmfast.bench.subject import Subject, Trial
from llmfast.errors import UnsupportedError
from llmfast.report import Column

ORDER = 50
KIND = "speed"
TASKS = (
    "feature-extraction",
    "fill-mask",
    "question-answering",
    "text-classification",
    "text-ranking",
    "token-classification",
)
NEEDS = ("vocab_size",)
HIGHER_IS_BETTER = {"latency_s_{shape}": False, "samples_per_s_{shape}": True}
COLUMNS = (
    Column("{shape} ms", "latency_s_{shape}", lambda value: f"{value * 1e3:.1f}"),
    Column("{shape} samples/s", "samples_per_s_{shape}", lambda value: f"{value:.1f}"),
    Column("x", "samples_per_s_{shape}_ratio", lambda value: f"{value:.2f}"),
)

_REPEATS = 5


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return, for every shape, the median seconds of a run and the samples per second that makes."""
    figures = {}
    offered = [entry.name for entry in subject.session.get_outputs()]
    outputs = [name for name in subject.task.OUTPUTS if name in offered][-1:]  # the vector, not every position
    for shape, (batch, length) in trial.shapes.items():
        feed = _feed(subject, trial.ids(batch, length))
        latency = float(np.median([_time_run(subject, outputs, feed) for _ in range(_REPEATS)]))
        figures[f"latency_s_{shape}"] = latency
        figures[f"samples_per_s_{shape}"] = batch / latency
    return figures


def _time_run(subject: Subject, outputs: list[str], feed: dict[str, np.ndarray]) -> float:
    start = subject.clock()
    subject.session.run(outputs, feed)
    return subject.clock() - start


def _feed(subject: Subject, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the graph's inputs for unpadded rows of token ids, int64 [batch, seq]."""
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
    }
    inputs = {entry.name: entry.type for entry in subject.session.get_inputs()}
    if unknown := sorted(set(inputs) - set(known)):
        raise UnsupportedError(f"`{subject.bundle.model}` is no text encoder: it wants `{unknown[0]}`")
    return {
        name: np.ascontiguousarray(known[name], np.int32 if kind == "tensor(int32)" else np.int64)
        for name, kind in inputs.items()
    }
