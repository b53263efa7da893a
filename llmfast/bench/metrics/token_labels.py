"""How often a token gets another label than the baseline gives it; of a masked language model: another word for a gap.

flipped_tokens = share of the tokens, special ones left out, whose most likely label is not the baseline's; for
fill-mask of the mask tokens only. O(texts) forward passes.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.records import Mapped, Records
from llmfast.report import Column

ORDER = 81
KIND = "quality"
TASKS = ("fill-mask", "token-classification")
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = "a text a line (for fill-mask with the mask token), for flipped tokens"
HIGHER_IS_BETTER = {"flipped_tokens": False}
COMPARED: tuple[str, ...] = ()
COLUMNS = (Column("flipped tokens %", "flipped_tokens", lambda value: f"{value * 100:.2f}"),)

_BATCH = 4  # a masked language model's logits are as wide as its vocabulary


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> Collection[tuple[str, ...]]:
    """Read the lines in batches; every line is used."""
    from llmfast.tokenizer import Tokenizer

    records = Records(data, "text", parse=lambda line: (line,))
    if bundle.manifest.task == "fill-mask":
        mask = Tokenizer.load(bundle.path).special_tokens.get("mask_token", "")
        lacking = next((text for (text,) in records if not mask or mask not in text), None)
        if lacking is not None:
            raise InputError(f"`{data}`: no `{mask}` in the line `{lacking[:60]}`", "each line needs a gap to fill")
    return Mapped(records.batches(_BATCH), lambda batch: tuple(text for (text,) in batch))


def answer(subject: Subject, texts: tuple[str, ...]) -> np.ndarray:
    """Return the likeliest label of every token, int64 [tokens, 2] = number of the text, label."""
    tokenizer = subject.tokenizer
    encoded = tokenizer.encode_windows(texts, subject.bundle.longest_text())
    windows = [first for first, *_ in encoded]
    labels = subject.task.score_tokens(subject.session, tokenizer.pad(windows)).argmax(-1)
    gap = tokenizer.special_id("mask_token") if subject.bundle.manifest.task == "fill-mask" else None
    found = []
    for number, window in enumerate(windows):
        special = np.array(window.special_tokens_mask, np.bool_)
        chosen = np.flatnonzero(~special if gap is None else np.array(window.ids) == gap)
        found.append(np.stack([np.full(len(chosen), number), labels[number, chosen]], axis=1))
    return np.concatenate(found).astype(np.int64)


def compare(texts: tuple[str, ...], labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row per text, float64 [texts, 2] = tokens, flipped ones; NaN where the tokens are others."""
    same_tokens = labels.shape == reference.shape and bool((labels[:, 0] == reference[:, 0]).all())
    flips = labels[:, 1] != reference[:, 1] if same_tokens else np.full(len(labels), np.nan)
    numbers = labels[:, 0]
    return np.stack([np.bincount(numbers, weights, len(texts)) for weights in (None, flips)], axis=1)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some texts from their rows, float64 [texts, 2]."""
    tokens, flips = rows.sum(axis=0)
    return {"flipped_tokens": float(flips / tokens) if tokens else None}
