"""How often a classifier is right, and how often it gives another label than the baseline does.

accuracy = share of texts, images or recordings whose most likely label is the given one, by its number or its name;
f1 = macro F1, the mean over the labels that occur of 2 tp / (2 tp + fp + fn); flipped_labels = share of them with
another label than the baseline's. O(texts) forward passes.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.records import Mapped, Records
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
    "name, or CSV, TSV, JSONL, for accuracy, F1 and flipped labels"
)
HIGHER_IS_BETTER = {"accuracy": True, "f1": True, "flipped_labels": False}
COMPARED = ("accuracy", "f1")
COLUMNS = (
    Column("accuracy %", "accuracy", lambda value: f"{value * 100:.1f}"),
    Column("F1 %", "f1", lambda value: f"{value * 100:.1f}"),
    Column("flipped %", "flipped_labels", lambda value: f"{value * 100:.1f}"),
)

_BATCH = 8
_NUMBERED = re.compile(r"(?:label_)?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Examples:
    """Some texts, pairs or paths, the numbers of the labels they should get, and the baseline's names of labels."""

    labels: tuple[int, ...]
    texts: "tuple[Text, ...]"
    names: tuple[str, ...] = ()


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> Collection[Examples]:
    """Read labelled lines in batches; every line is used.

    Raises:
        InputError: a line of another form, a label that the model lacks, or a file that is missing.
    """
    reads_files = bundle.manifest.task != "text-classification"
    if reads_files:
        records = Records(data, "label", "file")
    else:
        records = Records(data, "label", "text", "text_pair", optional=1, parse=_parse_line)
    names = tuple(bundle.manifest.architecture.get("labels") or ())
    for label, name, *_ in records:
        _number_of(label, names, data)
        if reads_files and not (data.parent / name).is_file():
            raise InputError(f"not found: `{data.parent / name}`, a file that `{data}` names")
    size = 1 if reads_files else _BATCH  # recordings differ in length

    def read(batch: tuple[tuple[str, ...], ...]) -> Examples:
        labels = tuple(_number_of(label, names, data) for label, *_ in batch)
        # Paths that are not absolute lie beside the data file.
        texts = [str(data.parent / name) if reads_files else _as_pair(name, *rest) for _, name, *rest in batch]
        return Examples(labels, tuple(texts), names)

    return Mapped(records.batches(size), read)


def _parse_line(line: str) -> Sequence[str]:
    label, *rest = line.split(None, 1)
    return [label, *(part for text in rest for part in text.split("\t", 1))]


def _as_pair(text: str, second: str = "") -> "Text":
    return (text, second) if second else text


def _number_of(label: str, names: tuple[str, ...], data: Path) -> int:
    """Return the number of a label that is given by name or number.

    Raises:
        InputError: the model has no such label.
    """
    known = [name.casefold() for name in names]
    if label.casefold() in known:
        return known.index(label.casefold())
    match = _NUMBERED.fullmatch(label)
    if match is None or (names and int(match[1]) >= len(names)):
        raise InputError(f"`{data}`: the model has no label `{label}`", f"it has: {', '.join(names[:20]) or 'numbers'}")
    return int(match[1])


def answer(subject: Subject, item: Examples) -> np.ndarray:
    """Return each text's most likely label, strings [texts, 2] = number and name."""
    scores = subject.task.classify(subject.session, subject.encode(item.texts))
    names = subject.bundle.manifest.architecture.get("labels") or []
    labels = [int(row) for row in np.argmax(scores, axis=-1)]
    return np.array([(str(label), names[label] if label < len(names) else f"LABEL_{label}") for label in labels])


def compare(item: Examples, labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row per text: float64 [texts, 3] = the right label, the one found, whether the baseline's differs.

    Labels are told apart by name, since a bundle may number them in another order than the baseline.
    """
    names = [name.casefold() for name in item.names]
    rows = [
        (want, names.index(name.casefold()) if name.casefold() in names else int(number), name != theirs)
        for want, (number, name), theirs in zip(item.labels, labels.tolist(), reference[:, 1].tolist(), strict=True)
    ]
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
