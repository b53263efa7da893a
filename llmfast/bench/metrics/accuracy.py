"""How often a classifier is right, and how often it gives another label than the baseline does.

accuracy = share of texts, images or recordings whose most likely label is the given one, by its number or its name;
f1 = macro F1, the mean over the labels that occur of 2 tp / (2 tp + fp + fn); flipped_labels = share of them with
another label than the baseline's. O(texts) forward passes.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from llmfast.bench.labelled import LINES, Examples, read_examples
from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.report import Column

ORDER = 80
KIND = "quality"
TASKS = ("audio-classification", "image-classification", "text-classification")
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = f"{LINES}, for accuracy, F1 and flipped labels"
HIGHER_IS_BETTER = {"accuracy": True, "f1": True, "flipped_labels": False}
COMPARED = ("accuracy", "f1")
COLUMNS = (
    Column("accuracy %", "accuracy", lambda value: f"{value * 100:.1f}"),
    Column("F1 %", "f1", lambda value: f"{value * 100:.1f}"),
    Column("flipped %", "flipped_labels", lambda value: f"{value * 100:.1f}"),
)


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> Collection[Examples]:
    """Read labelled lines in batches; every line is used.

    Raises:
        InputError: a line of another form, a label that the model lacks, or a file that is missing.
    """
    return read_examples(bundle, data)


def answer(subject: Subject, item: Examples) -> np.ndarray:
    """Return each text's most likely label, strings [texts, 2] = number and name."""
    scores = subject.task.classify(subject.session, subject.encode(item.texts))
    names = subject.bundle.manifest.architecture.get("labels") or []
    labels = [int(row) for row in np.argmax(scores, axis=-1)]
    return np.array([(str(label), names[label] if label < len(names) else f"LABEL_{label}") for label in labels])


def compare(item: Examples, labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row per text: float64 [texts, 3] = the right label, the one found, whether the baseline's differs.

    A label is the baseline's of its name, since a bundle may number them in another order, or else of its number.
    """
    names = [name.casefold() for name in item.names]

    def numbers(found: np.ndarray) -> list[int]:
        return [
            names.index(name.casefold()) if name.casefold() in names else int(number) for number, name in found.tolist()
        ]

    ours, theirs = numbers(labels), numbers(reference)
    rows = [(want, own, own != other) for want, own, other in zip(item.labels, ours, theirs, strict=True)]
    return np.array(rows, np.float64)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some texts from their rows, float64 [texts, 3]."""
    wanted, found, flipped = rows.T
    right = wanted == found
    scores = []
    for label in np.unique(wanted):
        hits = float((right & (wanted == label)).sum())
        scores.append(2 * hits / float((wanted == label).sum() + (found == label).sum()))
    return {"accuracy": float(right.mean()), "f1": float(np.mean(scores)), "flipped_labels": float(flipped.mean())}
