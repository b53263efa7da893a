"""One forward pass of a text encoder on random token ids, timed several times."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmfast.bench.subject import Spent, Subject, Trial
from llmfast.errors import UnsupportedError
from llmfast.example_inputs import random_inputs

# The first run finds the caches as another model left them.
_REPEATS = 5


@dataclass(frozen=True)
class Encoding:
    """The seconds of each run, and what all of them cost."""

    latencies_s: tuple[float, ...]
    spent: Spent


def time_encoder(subject: Subject, trial: Trial, shape: str) -> Encoding:
    """Run an encoder on the trial's ids; metrics of one round share the runs.

    Raises:
        UnsupportedError: the graph wants an input that no text makes.
    """
    return subject.once(trial, shape, lambda: _time(subject, trial, shape))


def make_run(subject: Subject, trial: Trial) -> Callable[[], object]:
    """Return what runs an encoder, or a module of no known task, once, with all threads on each operator: operators
    that run beside each other would be measured together."""
    if "example_inputs" in subject.bundle.manifest.architecture:
        feed, outputs = random_inputs(subject.bundle, trial.seed), None
    else:
        feed, outputs = _feed(subject, trial.ids(*next(iter(trial.shapes.values())))), _outputs(subject)
    return lambda: subject.session.run(outputs, feed)


def _outputs(subject: Subject) -> list[str]:
    """Return the name of the vector or the logits, not of every position."""
    offered = [entry.name for entry in subject.session.get_outputs()]
    return [name for name in subject.task.OUTPUTS if name in offered][-1:]


def _time(subject: Subject, trial: Trial, shape: str) -> Encoding:
    batch, length = trial.shapes[shape]
    outputs = _outputs(subject)
    feed = _feed(subject, trial.ids(batch, length))
    session = subject.encoder(batch)
    with subject.spending() as spent:
        latencies = tuple(_time_run(subject.clock, lambda: session.run(outputs, feed)) for _ in range(_REPEATS))
        return Encoding(latencies, spent())


def _time_run(clock: Callable[[], float], run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


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
