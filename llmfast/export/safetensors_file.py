"""Reading a .safetensors file's header within bounds, and its tensors one at a time through a memory map.

Format: https://github.com/huggingface/safetensors#format
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmfast.errors import InputError, UnsupportedError
from llmfast.files import GIT_LFS, open_regular, parse_json

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER_BYTES = 100_000_000
_INTEGERS = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}


class SafetensorsFile:
    """The header of a .safetensors file and access to its tensors.

    Attributes:
        entries: name -> `dtype`, `shape` and `data_offsets`.

    Raises:
        InputError: unreadable, truncated or malformed.
        UnsafeInputError: no regular file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        header = read_header(path)
        try:
            with safe_open(path, framework="numpy"):
                pass  # checks shapes, and that the tensors fill the file without holes
            self.entries: dict[str, dict[str, Any]] = parse_json(header)
        except (SafetensorError, ValueError) as error:
            raise InputError(f"truncated or corrupt safetensors: `{path}`: {error}", "download it again") from error
        except OSError as error:
            raise InputError(f"cannot read `{path}`: {error.strerror or error}") from error
        self.entries.pop("__metadata__", None)
        self._data = 8 + len(header)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors; they fill the file behind the header."""
        return max((int(entry["data_offsets"][1]) for entry in self.entries.values()), default=0)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor of floats as float32."""
        entry = self.entries[name]
        if entry["dtype"] not in FLOATS:
            raise UnsupportedError(
                f"weight `{name}` of `{self.path}` has type {entry['dtype']}, not floating point",
                "export the checkpoint it was quantized from",
            )
        return self.read_stored(name).astype(np.float32, copy=False)

    def read_stored(self, name: str) -> np.ndarray:
        """Return a tensor in its own type."""
        entry = self.entries[name]
        dtype = (FLOATS | _INTEGERS).get(entry["dtype"])
        if dtype is None:
            raise UnsupportedError(
                f"tensor `{name}` of `{self.path}` has type {entry['dtype']}, which is not supported"
            )
        offset = self._data + entry["data_offsets"][0]
        return np.memmap(self.path, dtype, "r", offset, tuple(entry["shape"]))


def read_header(path: Path) -> bytes:
    """Return the JSON header of a .safetensors file, which the format limits to 100 MB."""
    with open_regular(path) as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head and GIT_LFS.startswith(head):
            raise InputError(f"Git LFS pointer, not the weights: `{path}`", "run `git lfs pull`")
        if head.lstrip().startswith(b"<"):
            raise InputError(f"looks like HTML, not safetensors: `{path}`", "download it again")
        header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    if len(head) < 8 or len(header) < length:
        reason = f"its header has {length} bytes, of which {len(header)} can be read" if len(head) == 8 else "no header"
        raise InputError(f"truncated or corrupt safetensors: `{path}`: {reason}", "download it again")
    return header
