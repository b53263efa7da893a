"""How often a classifier is right, and how often it gives another label than the baseline does.

accuracy = share of texts whose most likely label is the given one, by its number or its name;
flipped_labels = share of texts with another label than the baseline's. O(texts) forward passes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.report import Column

ORDER = 80
KIND = "quality"
TASKS = ("text-classification",)
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = "lines of `label text`, the label by number or name, for accuracy and flipped labels"
HIGHER_IS_BETTER = {"accuracy": True, "flipped_labels": False}
COMPARED = ("accuracy",)
COLUMNS = (
    Column("accuracy %", "accuracy", lambda value: f"{value * 100:.1f}"),
    Column("flipped %", "flipped_labels", lambda value: f"{value * 100:.1f}"),
)

_BATCH = 8


@dataclass(frozen=True)
class Examples:
    """Some texts and the labels they should get."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[Examples]:
    """Read labelled lines in batches; every line is used."""
    from llmfast.text import read_labelled

    lines = read_labelled(data)
    names = [name.casefold() for name in bundle.manifest.architecture.get("labels") or []]
    known = {*names, *map(str, range(len(names)))}
    unknown = next((label for label, _ in lines if names and label.casefold() not in known), None)
    if unknown is not None:
        raise InputError(f"`{data}`: the model has no label `{unknown}`", f"it has: {', '.join(names[:20])}")
    batches = [lines[start : start + _BATCH] for start in range(0, len(lines), _BATCH)]
    return [Examples(*map(tuple, zip(*batch, strict=True))) for batch in batches]


def answer(subject: Subject, item: Examples) -> np.ndarray:
    """Return each text's most likely label, strings [texts, 2] = number and name."""
    scores = subject.task.classify(subject.session, subject.encode(item.texts))
    names = subject.bundle.manifest.architecture.get("labels") or []
    labels = [int(row) for row in np.argmax(scores, axis=-1)]
    return np.array([(str(label), names[label] if label < len(names) else f"LABEL_{label}") for label in labels])


def compare(item: Examples, labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row per text: float64 [texts, 2] = is right, differs from the baseline (by name)."""
    expected = [label.casefold() for label in item.labels]
    rows = [
        (want in (number, name.casefold()), name != theirs)
        for want, (number, name), theirs in zip(expected, labels.tolist(), reference[:, 1].tolist(), strict=True)
    ]
    return np.array(rows, np.float64)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some texts from their rows, float64 [texts, 2]."""
    accuracy, flipped = rows.mean(axis=0)
    return {"accuracy": float(accuracy), "flipped_labels": float(flipped)}
