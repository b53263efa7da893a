"""Reading a GGUF file's header within bounds, and its tensors through a memory map.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader
trusts the counts a file declares and can hang on 43 bytes; only its de-quantization is used here.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.errors import InputError, UnsupportedError
from llmfast.graph.model import GIT_LFS

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_NAME_BYTES = 64
_MAX_STRING_BYTES = 64 << 20


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    kind: int
    offset: int
    length: int


class GgufFile:
    """The metadata of a GGUF file and access to its tensors.

    Attributes:
        metadata: key -> value as the file holds them.
        tensors: names in the file's order.

    Raises:
        InputError: not GGUF, malformed, or truncated.
        UnsupportedError: a version or tensor type that can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise InputError(f"empty file: `{path}`", "download it again") from error
        except OSError as error:
            raise InputError(f"cannot read `{path}`: {error.strerror}") from error
        if self._map[: len(GIT_LFS)] == GIT_LFS:
            raise InputError(f"Git LFS pointer, not the model: `{path}`", "run `git lfs pull`")
        if self._map[:4] != _MAGIC:
            raise InputError(f"not a GGUF file: `{path}`", "it does not begin with GGUF; download it again")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise UnsupportedError(f"`{path}` is GGUF version {version}, supported: 2 and 3")
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):  # a false count runs into the end of the file
            key = self._string()
            if key in self.metadata:
                raise self._malformed(f"key `{key}` twice")
            self.metadata[key] = self._value(self._scalar("I"))
        self.tensors = self._read_tensors(tensors)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor de-quantized to float32, in PyTorch's order of dimensions."""
        from gguf import GGMLQuantizationType, quants

        tensor = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, tensor.length, tensor.offset)
        values: np.ndarray = quants.dequantize(raw, GGMLQuantizationType(tensor.kind))
        return values.reshape(tensor.shape)

    def _read_tensors(self, count: int) -> dict[str, _Tensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string(_MAX_NAME_BYTES)
            dims = self._scalar("I")
            if dims > _MAX_DIMS or name in places:
                raise self._malformed(f"tensor `{name}` appears twice or has {dims} dimensions")
            shape = tuple(self._scalar("Q") for _ in range(dims))
            places[name] = (shape[::-1], self._scalar("I"), self._scalar("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._malformed(f"alignment {alignment}")
        start = math.ceil(self._at / alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in places.items():
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (KeyError, ValueError) as error:
                raise UnsupportedError(f"tensor `{name}` of `{self.path}` has unknown type {kind}") from error
            elements = math.prod(shape)
            if elements == 0 or shape[-1] % block:
                raise self._malformed(f"tensor `{name}` has shape {shape} in blocks of {block}")
            length = elements // block * block_bytes
            if start + offset + length > len(self._map):
                raise InputError(
                    f"truncated GGUF: `{self.path}`: tensor `{name}` needs {length} bytes at {start + offset}, "
                    f"the file has {len(self._map)}",
                    "download it again",
                )
            tensors[name] = _Tensor(shape, kind, start + offset, length)
        return tensors

    def _take(self, size: int) -> bytes:
        if size > len(self._map) - self._at:
            raise self._malformed("it ends inside its header")
        data = self._map[self._at : self._at + size]
        self._at += size
        return data

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _string(self, limit: int = _MAX_STRING_BYTES) -> str:
        length = self._scalar("Q")
        if length > limit:
            raise self._malformed(f"a string of {length} bytes")
        return self._take(length).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._malformed(f"value type {kind}")
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind == _STRING:
            return [self._string() for _ in range(length)]
        if kind not in _SCALARS:
            raise self._malformed(f"an array of type {kind}")
        return list(struct.unpack(f"<{length}{_SCALARS[kind]}", self._take(length * struct.calcsize(_SCALARS[kind]))))

    def _malformed(self, reason: str) -> InputError:
        return InputError(f"malformed GGUF: `{self.path}`: {reason}", "download it again")
