"""What was done to a PyTorch checkpoint, kept beside its config.json, so that an export goes on from there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmfast.bundle import LINEAGE, Step, read_json
from llmfast.errors import InputError
from llmfast.report import to_json

_FORMAT = 1


def read_lineage(folder: Path) -> tuple[Step, ...]:
    """Return the steps that made a checkpoint, oldest first; none of one that llmfast did not write.

    Raises:
        InputError: malformed, or of another format.
    """
    path = folder / LINEAGE
    if not path.is_file():
        return ()
    document = read_json(path)
    try:
        if document["format"] != _FORMAT:
            raise InputError(f"`{path}` has format {document['format']}, this llmfast reads {_FORMAT}")
        return tuple(Step(**step) for step in document["lineage"])
    except (KeyError, TypeError) as error:
        raise InputError(f"malformed lineage: `{path}`: {error}", "remove the file to go on without it") from error


def write_lineage(folder: Path, steps: Sequence[Step], measured: Mapping[str, Any]) -> None:
    """Write the steps that made the checkpoint in `folder`, and what the last one measured, by its stage's name."""
    document = {"format": _FORMAT, "lineage": [asdict(step) for step in steps], "measured": measured}
    (folder / LINEAGE).write_text(to_json(document) + "\n", encoding="utf-8")
