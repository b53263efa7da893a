"""Plain text on disk and standard input: passages for token windows, and lines."""

import codecs
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmfast import report
from llmfast.errors import InputError
from llmfast.records import Records, is_table

if TYPE_CHECKING:
    from llmfast.tokenizer import Tokenizer

# A guess of what to read first; more is read when it was too low.
_BYTES_PER_TOKEN = 6
_TORN_TOKENS = 64


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
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_stdin() -> str:
    """Read standard input to its end, as UTF-8 whatever the locale.

    Raises:
        InputError: not UTF-8.
    """
    data = io.BytesIO(sys.stdin.buffer.read())
    try:
        return io.TextIOWrapper(data, encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: standard input: byte {error.start}", "convert it to UTF-8") from error


def leading_windows(
    path: Path, tokenizer: "Tokenizer", num_samples: int, seq_len: int, skipped: int, may_be_fewer: bool = False
) -> list[tuple[np.ndarray, str]]:
    """Cut the beginning of a text file into windows of tokens that follow one another.

    No more of the file is read than the windows need: its size costs no memory.

    Args:
        path: a text file.
        tokenizer: of the model.
        num_samples: how many windows to take; a note says when the text holds fewer.
        seq_len: tokens in a window.
        skipped: first tokens of a window that the text returned leaves out.
        may_be_fewer: without a note, where the text holds fewer.

    Returns:
        For each window its tokens, int64 [seq_len], and the text of those after the first `skipped`.

    Raises:
        InputError: as `read_text`, or the text does not fill one window.
    """
    wanted = num_samples * seq_len
    size = wanted * _BYTES_PER_TOKEN
    while True:
        text, is_whole = _read_beginning(path, size)
        ids, ends = tokenizer.encode_spans(text)
        if is_whole or len(ids) > wanted + _TORN_TOKENS:  # the last tokens may be torn by the cut
            break
        size *= 2
    fitting = max(1, len(ids) // seq_len)
    count = len(token_windows(ids, min(num_samples, fitting) if may_be_fewer else num_samples, seq_len))
    windows = []
    for start in range(0, count * seq_len, seq_len):
        begin, end = int(ends[start + skipped - 1]), int(ends[start + seq_len - 1])
        windows.append((ids[start : start + seq_len], text[begin:end]))
    return windows


def _read_beginning(path: Path, size: int) -> tuple[str, bool]:
    """Return the text of a file's first bytes, up to a whole character, and whether that is all of it."""
    if is_table(path):
        texts: list[str] = []
        for (text,) in Records(path, "text"):
            texts.append(text)
            size -= len(text)
            if size < 0:
                return "\n".join(texts), False
        return "\n".join(texts), True
    try:
        with path.open("rb") as file:
            data = file.read(size + 1)
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    if len(data) <= size:
        return read_text(path), True
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data[:size]), False
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: `{path}`: byte {error.start}", "convert it to UTF-8") from error


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
