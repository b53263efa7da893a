"""Plain text on disk: passages for token windows, and line-based data for encoders."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmfast import report
from llmfast.errors import InputError


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        InputError: missing, unreadable, not UTF-8, or without a single visible character.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: `{path}`: byte {error.start}", "convert it to UTF-8") from error
    if not text.strip():
        raise InputError(f"no text in `{path}`", "the file is empty or blank")
    return text


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not blank, without the space around them."""
    return [text for _, text in _numbered_lines(path)]


def read_pairs(path: Path) -> list[tuple[float, str, str]]:
    """Read sentence pairs, one `score<TAB>sentence<TAB>sentence` a line.

    Raises:
        InputError: a line of another form; the message names it.
    """
    pairs = []
    for number, line in _numbered_lines(path):
        try:
            score, first, second = line.split("\t")
            if not math.isfinite(float(score)):
                raise ValueError(score)
            pairs.append((float(score), first, second))
        except ValueError as error:
            raise InputError(
                f"malformed pair: `{path}`: line {number}", "each line is score<TAB>sentence<TAB>sentence"
            ) from error
    return pairs


def read_translations(path: Path) -> list[tuple[str, str]]:
    """Read sources and what is expected of them, one `source<TAB>target` a line.

    Raises:
        InputError: a line of another form; the message names it.
    """
    pairs = []
    for number, line in _numbered_lines(path):
        source, separator, target = line.partition("\t")
        if not separator or "\t" in target or not source.strip() or not target.strip():
            raise InputError(f"malformed pair: `{path}`: line {number}", "each line is source<TAB>target")
        pairs.append((source, target))
    return pairs


def read_labelled(path: Path) -> list[tuple[str, str]]:
    """Read labelled texts, one `label text` a line.

    Returns:
        (label, text) as written: whether a label is a number or a name is the model's affair.

    Raises:
        InputError: a line without text; the message names it.
    """
    texts = []
    for number, line in _numbered_lines(path):
        label, _, text = line.partition(" ")
        if not text.strip():
            raise InputError(f"no text after the label: `{path}`: line {number}", "each line is: label text")
        texts.append((label, text.strip()))
    return texts


def token_windows(ids: Sequence[int] | np.ndarray, num_samples: int, seq_len: int) -> np.ndarray:
    """Cut tokens into windows that follow one another without overlap, from the first token on.

    Args:
        ids: token ids of the text.
        num_samples: how many windows to take; a note says when the text holds fewer.
        seq_len: tokens in a window.

    Returns:
        int64 [windows, seq_len], 1 <= windows <= num_samples.

    Raises:
        InputError: the text does not fill one window.
    """
    held = len(ids) // seq_len
    if held == 0:
        raise InputError(
            f"text too short: {len(ids)} tokens, one window needs {seq_len}",
            "give more text or a shorter window",
        )
    if held < num_samples:
        report.note(f"note: the text holds {held} windows of {seq_len} tokens, {num_samples} were asked for")
    count = min(held, num_samples)
    return np.asarray(ids[: count * seq_len], np.int64).reshape(count, seq_len)


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]
