"""How far the outputs of an encoder of images or sound, or of a module of no known task, moved, on random inputs.

output_error = sqrt(sum (y - y')^2 / sum y'^2) over all floating-point outputs, y' the baseline's: 0 is the same.
Integer outputs (a most likely class) count as they are. One forward pass per model and sample.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bench.workload import SIGNAL_TASKS
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.example_inputs import random_inputs
from llmfast.report import Column

ORDER = 90
KIND = "quality"
TASKS = SIGNAL_TASKS
NEEDS = ("example_inputs",)
UNIT = "samples"
DATA = ""
HIGHER_IS_BETTER = {"output_error": False}
COMPARED: tuple[str, ...] = ()
COLUMNS = (Column("output error", "output_error", lambda value: f"{value:.4f}"),)

_SAMPLES = 8


def prepare(bundle: ModelBundle, data: Path | None, options: BenchOptions) -> list[dict[str, np.ndarray]]:
    """Draw inputs; there is no file to read."""
    return [random_inputs(bundle, (options.seed, number)) for number in range(_SAMPLES)]


def answer(subject: Subject, item: dict[str, np.ndarray]) -> np.ndarray:
    """Return all outputs one after the other, float64 [values].

    Raises:
        InputError: the bundle takes other inputs than the baseline.
    """
    inputs = {value.name for value in subject.session.get_inputs()}
    if inputs != set(item):
        raise InputError(f"its inputs are {', '.join(sorted(inputs))}, the baseline's are {', '.join(sorted(item))}")
    outputs: list[Any] = subject.session.run(None, item)
    return np.concatenate([np.asarray(output, np.float64).ravel() for output in outputs])


def compare(item: dict[str, np.ndarray], values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one sample's sums: of squared differences and of the baseline's squares, float64 [1, 2]; NaN when
    the outputs have another size than the baseline's."""
    if values.shape != reference.shape:
        return np.full((1, 2), np.nan)
    difference = np.subtract(values, reference, out=np.zeros_like(values), where=values != reference)
    finite = reference[np.isfinite(reference)]  # infinities are masks; where both have one there is no difference
    return np.array([[np.square(difference).sum(), np.square(finite).sum()]])


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figure of some samples from their sums, float64 [samples, 2]."""
    difference, power = rows.sum(axis=0)
    return {"output_error": float(np.sqrt(difference / power)) if power else None}
