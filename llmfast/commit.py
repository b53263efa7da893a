"""How output comes into being: staged beside its place, synced to the disk, renamed.

Whenever the power fails, what stands at the output's place is the old or the new, whole. An existing directory is
exchanged with the new one in one step where the system can do that (Linux); elsewhere it is moved aside first, and
the next run moves it back should this one die in between.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llmfast.errors import OutputExistsError

_STRAY_AGE_S = 3600  # another machine's process may have a number that is nobody's here
_STAGED_BY = r"(\d+)-[0-9a-f]{8}"  # a process, and what tells its paths apart
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def staging_path(output: Path) -> Path:
    """Return an unused path beside `output`; it names the process, so that others see whether that is still there."""
    return output.with_name(f"{_prefix(output)}{os.getpid()}-{secrets.token_hex(4)}")


def is_staged(name: str) -> bool:
    """Say whether `staging_path` gave this name; a run that is there writes the file, or one that died left it."""
    return re.fullmatch(rf"\..+\.llmfast-{_STAGED_BY}", name) is not None


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some file systems can't sync directories
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a directory is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def publish(staged: Path, output: Path, overwrite: bool) -> None:
    """Let a synced directory take the place of `output`.

    Raises:
        OutputExistsError: the output exists and may not be overwritten; another run may have written it.
        OSError: it can't be renamed; `output` is as it was.
    """
    if overwrite and os.path.lexists(output):
        if exchange(staged, output):
            shutil.rmtree(staged, ignore_errors=True)  # it is the old one now
        else:
            _move_aside(staged, output)
    else:
        try:
            if os.path.lexists(output):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(staged, output)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise OutputExistsError(
                f"output appeared while working: `{output}`", "another run wrote it; choose another -o"
            ) from error
    sync(output.parent)


def exchange(first: Path, second: Path) -> bool:
    """Let two directories change places in one step; return False where that is impossible."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(AttributeError):  # a C library without it
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        places = [_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second)]
        if rename(*places, _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # a file system or kernel without it
            raise OSError(code, os.strerror(code), str(second))
    return False


def sweep(output: Path) -> None:
    """Put back an output that a dead run had moved aside, and remove what dead runs staged."""
    for stray in _strays(output):
        aside = stray / output.name
        if not os.path.lexists(output) and aside.is_dir():
            os.rename(aside, output)
        shutil.rmtree(stray, ignore_errors=True)
        with contextlib.suppress(OSError):
            stray.unlink()


def _strays(output: Path) -> Iterator[Path]:
    pattern = re.compile(re.escape(_prefix(output)) + _STAGED_BY)
    for path in output.parent.iterdir():
        match = pattern.fullmatch(path.name)
        with contextlib.suppress(OSError):  # it went away meanwhile
            if match and not _is_alive(int(match[1])) and time.time() - path.lstat().st_mtime > _STRAY_AGE_S:
                yield path


def _prefix(output: Path) -> str:
    name = os.fsdecode(os.fsencode(output.name)[:128])  # a name may have 255 bytes, and this one is longer
    return f".{name}.llmfast-"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _move_aside(staged: Path, output: Path) -> None:
    aside = staging_path(output)
    aside.mkdir()
    try:
        os.rename(output, aside / output.name)
        os.rename(staged, output)
    except BaseException:
        if not os.path.lexists(output):
            os.rename(aside / output.name, output)  # should this fail too, the next run does it
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
