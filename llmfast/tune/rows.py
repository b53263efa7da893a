"""Data files as rows: passages, held-back rows, and the batches of an epoch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from llmfast.errors import InputError
from llmfast.records import Records, is_table
from llmfast.text import read_text

# Batches are made of rows of like length, found among so many batches' worth of rows in random order.
_SORTED_BATCHES = 50
Item = TypeVar("Item")


def read_passages(path: Path, fields: Mapping[str, str]) -> list[str]:
    """Read a text as one passage, or the `text` column of a table as one each.

    Args:
        path: plain text, or .csv, .tsv, .jsonl.
        fields: column -> its name in the file, where that is another one.
    """
    if not is_table(path):
        return [read_text(path)]
    return [text for (text,) in Records(path, "text", fields=fields, skip_empty=True)]


def split(rows: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Hold rows back, picked at random; at least one when any are wanted.

    Raises:
        InputError: too few rows.
    """
    if not share:
        return list(rows), []
    count = max(1, round(len(rows) * share))
    if count >= len(rows):
        raise InputError(
            f"too little data: {len(rows)} row, and {count} held back for validation",
            "give more, or --validation FILE, or --validation-split 0",
        )
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    held = set(order[:count].tolist())
    return [row for index, row in enumerate(rows) if index not in held], [rows[index] for index in sorted(held)]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of an epoch: a function of its arguments alone, so that a run can go on in the middle.

    Args:
        lengths: int [rows]; a batch has rows of like length, so that little is padding.
        batch_size: rows of a batch; the last one may have fewer.
        seed: of the run.
        epoch: from 0.

    Returns:
        Indices of rows; every row once.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * _SORTED_BATCHES):
        chosen = order[start : start + batch_size * _SORTED_BATCHES]
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        batches += [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))]


def in_order_of_length(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Yield batches for measuring: every row once, short ones first."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
