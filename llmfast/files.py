"""Files that strangers wrote: opened without waiting, read within bounds, found below their model's folder.

What a model names is taken only if it lies below the model's folder. The one exception is the Hugging Face cache,
whose snapshots are symbolic links to `blobs` in the same `models--*` folder; ONNX Runtime makes the same one
(https://github.com/microsoft/onnxruntime/pull/27374).
"""

import json
import os
import stat
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from llmfast.errors import InputError, UnsafeInputError

GIT_LFS = b"version https://git-lfs.github.com/"
MAX_JSON_BYTES = 64 << 20
# A tokenizer with a vocabulary of 256,000 tokens takes 34 MB.
MAX_TOKENIZER_BYTES = 256 << 20
# Set by `llmfast --allow-hardlinks`, and inherited by worker processes.
ALLOW_HARDLINKS = "LLMFAST_ALLOW_HARDLINKS"


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe or a device, which could block or never end, is refused.

    Raises:
        InputError: it can't be opened.
        UnsafeInputError: it is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise UnsafeInputError(f"cannot read {str(path)!r}: {error}") from error
    file = os.fdopen(descriptor, "rb")
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot read `{path}`: it is a directory")
    raise UnsafeInputError(f"`{path}` is no regular file", "a pipe or device can't hold a model")


def read_bounded(path: Path, limit: int) -> bytes:
    """Return a file's content.

    Raises:
        InputError: it can't be read, or is longer than `limit` bytes.
        UnsafeInputError: it is no regular file.
    """
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    if len(content) > limit:
        raise InputError(f"`{path}` is larger than {limit >> 20} MiB, the most that llmfast reads of such a file")
    return content


def parse_json(content: bytes) -> Any:
    """Parse a JSON document that means the same to every reader: UTF-8, no key twice, no NaN.

    Raises:
        ValueError: what is wrong, and in which line where that is known.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line}: not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from error


def locate(folder: Path, location: str, what: str) -> Path:
    """Return the real path of a file that a model names by a path relative to its folder.

    Args:
        folder: where the model lies.
        location: the name, as a stranger wrote it.
        what: who names it, for messages.

    Raises:
        InputError: there is no such file.
        UnsafeInputError: it leaves the folder, by its name or as a link, has other names, or is no regular file.
    """
    if not _is_beneath(location):
        raise UnsafeInputError(f"{what} points outside its folder: {location!r:.200}")
    path = folder / location
    try:
        real = path.resolve(strict=True)
        state = real.stat()
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise _bad_link(path, what) from error
        raise InputError(
            f"external data missing: `{path}` (first needed by {what})", "copy the data file beside the .onnx file"
        ) from error
    except (OSError, RuntimeError) as error:  # a loop of links is the one or the other
        if os.path.islink(path):
            raise _bad_link(path, what) from error
        raise InputError(f"cannot read `{path}`: {getattr(error, 'strerror', None) or error}") from error
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise _bad_link(path, what)
    _require_plain(state, path, what)
    return real


def open_located(folder: Path, location: str, what: str) -> BinaryIO:
    """Open a file that a model names, as `locate` finds it, even if somebody replaces it by a link meanwhile.

    No part of the way from the model's folder to the file may be a link any more: `locate` has followed them.

    Raises:
        InputError: there is no such file, or it can't be read.
        UnsafeInputError: as `locate`.
    """
    real = locate(folder, location, what)
    if os.open not in os.supports_dir_fd:  # Windows, where making links takes a privilege
        return open_regular(real)
    root = next(root for root in _roots(folder) if real.is_relative_to(root))
    *folders, name = real.relative_to(root).parts
    try:
        place = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=place)
        finally:
            os.close(place)
    except OSError as error:
        raise UnsafeInputError(f"{what} names `{real}`, which changed while it was opened: {error.strerror}") from error
    file = os.fdopen(descriptor, "rb")
    try:
        _require_plain(os.fstat(descriptor), real, what)
    except UnsafeInputError:
        file.close()
        raise
    return file


def _require_plain(state: os.stat_result, path: Path, what: str) -> None:
    """Refuse devices, and files that have other names."""
    if not stat.S_ISREG(state.st_mode):
        raise UnsafeInputError(f"{what} names `{path}`, which is no regular file")
    if state.st_nlink > 1 and not os.environ.get(ALLOW_HARDLINKS):
        raise UnsafeInputError(
            f"{what} names `{path}`, which has other names too (hard links): it may be any file of this disk",
            "copy the model, or run `llmfast --allow-hardlinks ...` if you made the links",
        )


def _is_beneath(location: str) -> bool:
    if not location or "\\" in location or "\0" in location or PureWindowsPath(location).drive:
        return False
    return not location.startswith("/") and not {"", ".", ".."} & set(location.split("/"))


def _roots(folder: Path) -> list[Path]:
    """Return the directories that a model's files may lie in."""
    roots = [folder.resolve()]
    logical = Path(os.path.abspath(folder))
    for place in (logical, *logical.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            roots.append((place.parent.parent / "blobs").resolve())
    return roots


def _bad_link(path: Path, what: str) -> UnsafeInputError:
    try:
        target = os.readlink(path) if os.path.islink(path) else str(path.resolve())
    except OSError:  # somebody is changing it
        target = "?"
    return UnsafeInputError(
        f"{what} names `{path}`, a link to `{target}`: outside the model's folder, or nothing",
        "copy the file into the model's folder",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key `{next(name for name in names if names.count(name) > 1):.100}` is there twice")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
