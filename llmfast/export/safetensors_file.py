"""A .safetensors file: its header, and tensors read one at a time, without PyTorch."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmfast.errors import InputError, UnsupportedError

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}


class Shard:
    """One .safetensors file. Format: https://github.com/huggingface/safetensors#format"""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass  # checks the header, and that the tensors fill the file without holes
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
        except SafetensorError as error:
            raise InputError(f"truncated or corrupt safetensors: `{path}`: {error}", "download it again") from error
        except OSError as error:
            raise InputError(f"cannot read `{path}`: {error.strerror or error}") from error
        self.entries.pop("__metadata__", None)
        self._data = 8 + length

    def read(self, name: str) -> np.ndarray:
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
