"""How often a classifier is right, and how often it gives another label than the baseline does.

accuracy = share of texts, images or recordings whose most likely label is the given one, by its number or its name;
flipped_labels = share of them with another label than the baseline's. O(texts) forward passes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.report import Column

if TYPE_CHECKING:
    from llmfast.tokenizer import Text

ORDER = 80
KIND = "quality"
TASKS = ("audio-classification", "image-classification", "text-classification")
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = (
    "lines of `label text` or `label text<TAB>text`, of images and sound `label<TAB>file`, the label by number or "
    "name, for accuracy and flipped labels"
)
HIGHER_IS_BETTER = {"accuracy": True, "flipped_labels": False}
COLUMNS = (
    Column("accuracy %", "accuracy", lambda value: f"{value * 100:.1f}"),
    Column("flipped %", "flipped_labels", lambda value: f"{value * 100:.1f}"),
)

_BATCH = 8


@dataclass(frozen=True)
class Examples:
    """Some texts, pairs of texts, or a file, and the labels they should get."""

    labels: tuple[str, ...]
    texts: "tuple[Text, ...]"


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[Examples]:
    """Read labelled lines in batches; every line is used.

    Raises:
        InputError: a line of another form, a label that the model lacks, or a file that is missing.
    """
    from llmfast.text import read_labelled

    reads_files = bundle.manifest.task != "text-classification"
    lines = _read_files(data) if reads_files else [(label, _as_pair(text)) for label, text in read_labelled(data)]
    names = [name.casefold() for name in bundle.manifest.architecture.get("labels") or []]
    known = {*names, *map(str, range(len(names)))}
    unknown = next((label for label, _ in lines if names and label.casefold() not in known), None)
    if unknown is not None:
        raise InputError(f"`{data}`: the model has no label `{unknown}`", f"it has: {', '.join(names[:20])}")
    size = 1 if reads_files else _BATCH  # recordings differ in length
    batches = [lines[start : start + size] for start in range(0, len(lines), size)]
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


def _read_files(data: Path) -> "list[tuple[str, Text]]":
    """Return labels and paths; those that are not absolute lie beside the data file."""
    from llmfast.text import read_lines

    files: list[tuple[str, Text]] = []
    for line in read_lines(data):
        label, tab, name = line.partition("\t")
        if not tab or not name.strip():
            raise InputError(f"malformed `{data}`: `{line}`", "each line is label<TAB>file")
        path = data.parent / name.strip()
        if not path.is_file():
            raise InputError(f"not found: `{path}`, a file that `{data}` names")
        files.append((label.strip(), str(path)))
    return files


def _as_pair(text: str) -> "Text":
    first, tab, second = text.partition("\t")
    return (first, second) if tab else text


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some texts from their rows, float64 [texts, 2]."""
    accuracy, flipped = rows.mean(axis=0)
    return {"accuracy": float(accuracy), "flipped_labels": float(flipped)}
