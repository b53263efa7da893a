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
    """Cut the beginning of a text file into windows of tokens that follow one another, each begun as a text is.

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
    prefix = tokenizer.prefix
    bounds = _window_bounds(ids, seq_len, prefix)
    wanted_windows = min(num_samples, max(1, len(bounds))) if may_be_fewer else num_samples
    windows = []
    for window, (start, stop) in zip(token_windows(ids, wanted_windows, seq_len, prefix), bounds, strict=False):
        given = max(0, skipped - (seq_len - (stop - start)))  # of the text's own tokens
        windows.append((window, text[int(ends[start + given - 1]) : int(ends[stop - 1])]))
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


def token_windows(
    ids: Sequence[int] | np.ndarray, num_samples: int, seq_len: int, prefix: Sequence[int] = ()
) -> np.ndarray:
    """Cut the beginning of a text's tokens into windows, as `cut_windows`.

    Args:
        ids: token ids of the text.
        num_samples: how many windows to take; a note says when the text holds fewer.
        seq_len: tokens in a window.
        prefix: what every window begins with.

    Returns:
        int64 [windows, seq_len], 1 <= windows <= num_samples.

    Raises:
        InputError: the text does not fill one window.
    """
    windows = cut_windows(ids, seq_len, prefix)
    if len(windows) == 0:
        raise InputError(
            f"text too short: {len(ids)} tokens, one window needs {seq_len}",
            "give more text or a shorter window",
        )
    if len(windows) < num_samples:
        report.note(f"note: the text holds {len(windows)} windows of {seq_len} tokens, {num_samples} were asked for")
    return windows[:num_samples]


def cut_windows(ids: Sequence[int] | np.ndarray, seq_len: int, prefix: Sequence[int] = ()) -> np.ndarray:
    """Cut tokens into windows that follow one another without overlap, from the first token on.

    A model meets no text without the tokens that its tokenizer puts before each, and without BOS many answer wildly:
    every window begins with them, and holds so much less text unless they are there already.

    Args:
        ids: token ids of the text.
        seq_len: tokens in a window.
        prefix: what every window begins with.

    Returns:
        int64 [windows, seq_len]; what does not fill a window is left out.

    Raises:
        InputError: a window has no room for text.
    """
    ids, opening = np.asarray(ids, np.int64), np.asarray(prefix, np.int64)
    parts = [
        np.concatenate([opening[: seq_len - (stop - start)], ids[start:stop]])
        for start, stop in _window_bounds(ids, seq_len, prefix)
    ]
    return np.array(parts, np.int64).reshape(-1, seq_len)


def _window_bounds(ids: np.ndarray, seq_len: int, prefix: Sequence[int]) -> list[tuple[int, int]]:
    """Return the numbers of each window's first token and of the one past its last; the prefix is in it or lacks."""
    if seq_len <= len(prefix):
        raise InputError(
            f"a window of {seq_len} tokens has no room for text: the tokenizer begins with {len(prefix)} of its own",
            "give a longer window",
        )
    bounds: list[tuple[int, int]] = []
    start = 0
    while True:
        has_prefix = np.array_equal(ids[start : start + len(prefix)], prefix)
        stop = start + seq_len - (0 if has_prefix else len(prefix))
        if stop > len(ids):
            return bounds
        bounds.append((start, stop))
        start = stop
