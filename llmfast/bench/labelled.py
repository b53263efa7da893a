"""Texts, pairs, images or recordings with the labels that they should get, for the metrics of classifiers."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.records import Mapped, Records

if TYPE_CHECKING:
    from llmfast.tokenizer import Text

# What --data takes.
LINES = (
    "lines of `label text` or `label text<TAB>text`, of images and sound `label<TAB>file`, the label by number or "
    "name, or CSV, TSV, JSONL"
)
_BATCH = 8
_NUMBERED = re.compile(r"(?:label_)?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Examples:
    """Some texts, pairs or paths, the numbers of the labels they should get, and the baseline's names of labels."""

    labels: tuple[int, ...]
    texts: "tuple[Text, ...]"
    names: tuple[str, ...] = ()


def read_examples(bundle: ModelBundle, data: Path) -> Collection[Examples]:
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
        number_of(label, names, data)
        if reads_files and not (data.parent / name).is_file():
            raise InputError(f"not found: `{data.parent / name}`, a file that `{data}` names")
    size = 1 if reads_files else _BATCH  # recordings differ in length

    def read(batch: tuple[tuple[str, ...], ...]) -> Examples:
        labels = tuple(number_of(label, names, data) for label, *_ in batch)
        # Paths that are not absolute lie beside the data file.
        texts = [str(data.parent / name) if reads_files else _as_pair(name, *rest) for _, name, *rest in batch]
        return Examples(labels, tuple(texts), names)

    return Mapped(records.batches(size), read)


def number_of(label: str, names: Sequence[str], place: object) -> int:
    """Return the number of a label that is given by name or number.

    Args:
        label: as somebody wrote it.
        names: the model's labels; empty when it has numbers only.
        place: where it was written.

    Raises:
        InputError: the model has no such label.
    """
    known = [name.casefold() for name in names]
    if label.casefold() in known:
        return known.index(label.casefold())
    match = _NUMBERED.fullmatch(label)
    if match is None or (names and int(match[1]) >= len(names)):
        raise InputError(
            f"`{place}`: the model has no label `{label}`", f"it has: {', '.join(names[:20]) or 'numbers'}"
        )
    return int(match[1])


def _parse_line(line: str) -> Sequence[str]:
    label, *rest = line.split(None, 1)
    return [label, *(part for text in rest for part in text.split("\t", 1))]


def _as_pair(text: str, second: str = "") -> "Text":
    return (text, second) if second else text
