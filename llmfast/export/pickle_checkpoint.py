"""Weights in pickles (.bin, .pt): only when the user allows it, only tensors, and only in a process of their own.

A pickle is a program. PyTorch's restricted loader runs the few instructions that make tensors; it had holes before
(CVE-2025-32434, CVE-2026-24747), so it is not enough that a file claims to hold weights.
"""

import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmfast.bundle import read_json
from llmfast.errors import InputError, ResourceError, UnsafeInputError
from llmfast.supervisor import tell_staged
from llmfast.worker import Worker

# Names of the files that `torch.save` writes weights to.
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")
_INDEX = "pytorch_model.bin.index.json"
_MAX_PROGRAM_BYTES = 64 << 20  # of the pickle itself, which only names tensors
_GLOBAL = re.compile(r"GLOBAL (\S+)")


def find_pickles(folder: Path) -> list[Path]:
    """Return the files that `torch.save` wrote the weights of a checkpoint to."""
    index = folder / _INDEX
    if not index.is_file():
        return sorted({file for pattern in PICKLES for file in folder.glob(pattern)})
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"malformed index: `{index}`") from error
    for name in names:
        if Path(name).name != name:
            raise UnsafeInputError(f"shard `{name}` of `{index}` leaves the folder")
        if not (folder / name).is_file():
            raise InputError(f"weights missing from `{folder}`: {name}", "download the folder again")
    return [folder / name for name in names]


def refusal(name: str) -> UnsafeInputError:
    """Return the error for weights that are a pickle, of the file of that name."""
    return UnsafeInputError(
        f"`{name}` is a pickle, which can run code when it is read",
        "add --allow-pickle to read its tensors and nothing else, or convert it to safetensors where you trust it",
    )


@contextmanager
def convert(folder: Path, files: list[Path], place: Path) -> Iterator[Path]:
    """Yield a copy of a checkpoint folder whose weights are safetensors; it is removed afterwards.

    Args:
        folder: the checkpoint.
        files: its weights, as `find_pickles` found them.
        place: the directory to write the copy to.

    Raises:
        InputError: truncated or damaged archives, or something else than a state dict in them.
        UnsafeInputError: the pickle wants more than tensors, or is of a form whose extent can't be checked.
        ResourceError: the copy can't be written.
    """
    for file in files:
        check_archive(file)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".llmfast-pickle-", dir=place) as temporary:
            tell_staged(Path(temporary))
            copy = Path(temporary) / folder.resolve().name
            copy.mkdir()
            for other in folder.iterdir():
                if other.is_file() and other not in files and other.name != _INDEX:
                    shutil.copyfile(other, copy / other.name)
            with Worker("llmfast.export.pickle_checkpoint:Converter") as worker:
                worker.call("convert", files, copy / "model.safetensors")
            yield copy
    except OSError as error:
        raise ResourceError(f"cannot write to `{place}`: {error.strerror or error}") from error


def check_archive(path: Path) -> None:
    """Refuse what is no archive of stored tensors, before any of it is unpickled.

    Raises:
        InputError: truncated, compressed (it may grow without bound), or with entries that overlap.
        UnsafeInputError: a bare pickle, as PyTorch wrote before 1.6.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            is_pickle = file.read(1) == b"\x80"
        if is_pickle:
            raise UnsafeInputError(f"`{path}` is a bare pickle", "save it with PyTorch 1.6 or newer")
        raise InputError(f"truncated or corrupt archive: `{path}`", "download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile) as error:
        raise InputError(f"truncated or corrupt archive: `{path}`: {error}", "download it again") from error
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise InputError(
                f"entry `{entry.filename}` of `{path}` is compressed", "PyTorch stores tensors as they are"
            )
        if entry.header_offset < end:
            raise InputError(f"entry `{entry.filename}` of `{path}` overlaps another")
        if entry.filename.endswith(".pkl") and entry.file_size > _MAX_PROGRAM_BYTES:
            raise InputError(f"entry `{entry.filename}` of `{path}` has {entry.file_size} bytes")
        end = entry.header_offset + entry.file_size
    if end > path.stat().st_size:
        raise InputError(f"truncated or corrupt archive: `{path}`", "download it again")


class Converter:
    """Reads pickles in a process of its own."""

    def convert(self, files: list[Path], output: Path) -> None:
        """Write the tensors of pickles as one .safetensors file."""
        import torch
        from safetensors.torch import save_file

        tensors: dict[str, Any] = {}
        for file in files:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # the restricted loader raises many kinds
                if found := _GLOBAL.search(str(error)):
                    raise UnsafeInputError(f"`{file}` wants `{found[1]}`, which is no tensor") from error
                raise InputError(f"PyTorch can't read `{file}`: {str(error).splitlines()[0][:200]}") from error
            if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
                raise InputError(f"`{file}` holds no state dict", "save `model.state_dict()`")
            tensors |= state
        # Cloned: safetensors do not share memory, as tied weights do.
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, output, {"format": "pt"})
