"""Labelled texts, and the labels of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmfast.errors import InputError
from llmfast.records import Records

# More kinds of labels than this, and nearly one per row, are no labels.
_MOST_LABELS = 20


Labelled = tuple[int, tuple[str, ...]]  # the number of the line, (label, text)


def read_labels(path: Path, fields: Mapping[str, str]) -> list[Labelled]:
    """Read labelled texts: lines of `label text`, or the columns `label` and `text` of a table.

    Raises:
        InputError: malformed, or a row without label or text.
    """
    lines = Records(path, "label", "text", parse=lambda line: line.split(None, 1), fields=fields)
    return list(lines.numbered())


def label_names(path: Path, records: Sequence[Labelled]) -> list[str]:
    """Return the labels of the data, numbers in their order.

    Raises:
        InputError: there is one label only, or so many that they can't be labels.
    """
    names = sorted({label for _, (label, _) in records})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    if len(names) < 2:
        raise InputError(f"`{path}` has a single label, `{names[0]}`", "there is nothing to tell apart")
    if len(names) > max(_MOST_LABELS, len(records) // 2):
        raise InputError(
            f"`{path}` has {len(names)} labels in {len(records)} rows, `{names[0]}` for instance",
            "each line is: label text; or a .csv, .tsv or .jsonl with the columns label and text",
        )
    return names


def find_label(label: str, names: Sequence[str]) -> int | None:
    """Return a label's number, by its name or else its number; None when there is no such label."""
    folded = [name.casefold() for name in names]
    if label.casefold() in folded:
        return folded.index(label.casefold())
    return int(label) if label.isdecimal() and int(label) < len(names) else None


def check_labels(path: Path, records: Sequence[Labelled], names: Sequence[str], owner: str = "") -> None:
    """Refuse labels that do not fit.

    Args:
        path: the file of the records.
        records: (label, text).
        names: the labels there are.
        owner: the checkpoint whose head has them; empty when they come from the data.

    Raises:
        InputError: names the first one.
    """
    alien = next(((line, label) for line, (label, _) in records if find_label(label, names) is None), None)
    if alien is None:
        return
    line, label = alien
    known = ", ".join(names[:20])
    lacking = f"which the head of `{owner}` lacks" if owner else f"which is none of {known}"
    raise InputError(
        f"`{path}`: line {line} has the label `{label}`, {lacking}",
        f"its labels: {known}; --new-head makes a head for those of the data"
        if owner
        else "labels are those of --labels, or else of --data",
    )
