"""Reading a GGUF file's header within bounds, and its tensors one at a time through a memory map.

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
from llmfast.files import GIT_LFS, open_regular

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
# A name, a key and a header may be this long; the longest header of a real model has some 20 MB.
_MAX_NAME_BYTES = 64
_MAX_KEY_BYTES = 65535
_MAX_HEADER_BYTES = 256 << 20
# The shortest possible key with its value, and tensor: a count that can't fit into the file is refused unread.
_MIN_ENTRY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
# De-quantization makes several copies of what it works on: this many values at a time stay in the cache.
_VALUES_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    kind: int
    offset: int
    length: int


class GgufFile:
    """The metadata of a GGUF file and access to its tensors.

    Attributes:
        metadata: key -> value as the file holds it: int, float, bool, str, list of str, or NumPy array of numbers.
        tensors: names in the file's order.

    Raises:
        InputError: not GGUF, malformed, or truncated.
        UnsupportedError: a version that can't be read, or one part of a model in several files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
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
        self._end = min(len(self._map), _MAX_HEADER_BYTES)
        version = self._scalar("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            found = "big-endian" if swapped else f"version {version}"
            raise UnsupportedError(f"`{path}` is GGUF, but {found}", "supported: versions 2 and 3, little-endian")
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        if tensors * _MIN_TENSOR_BYTES + entries * _MIN_ENTRY_BYTES > self._end - self._at:
            raise self._malformed(f"it declares {tensors} tensors and {entries} keys, more than fit into it")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string(_MAX_KEY_BYTES)
            if not key or key in self.metadata:
                raise self._malformed(f"key `{key[:200]}` is empty or there twice")
            self.metadata[key] = self._value(self._scalar("I"))
        self._refuse_parts()
        self.tensors = self._read_tensors(tensors)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor de-quantized to float32, in PyTorch's order of dimensions.

        Raises:
            UnsupportedError: a type without de-quantization, as integers.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        if kind == GGMLQuantizationType.F32:
            return np.frombuffer(self._map, "<f4", math.prod(tensor.shape), tensor.offset).reshape(tensor.shape)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        raw = np.frombuffer(self._map, np.uint8, tensor.length, tensor.offset).reshape(-1, block_bytes)
        values = np.empty((len(raw), block), np.float32)
        step = max(_VALUES_AT_ONCE // block, 1)
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale; whoever needs the values will see
                for start in range(0, len(raw), step):
                    part = raw[start : start + step].reshape(1, -1)  # the package works on 16 rows at a time
                    values[start : start + step] = quants.dequantize(part, kind).reshape(-1, block)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"tensor `{name}` of `{self.path}` has type {kind.name}, which can't be de-quantized",
                "choose a file with another quantization",
            ) from error
        return values.reshape(tensor.shape)

    def _refuse_parts(self) -> None:
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise UnsupportedError(
                f"`{self.path}` is one of {parts} parts of a model",
                "join them: `llama-gguf-split --merge FIRST.gguf WHOLE.gguf` of llama.cpp",
            )

    def _read_tensors(self, count: int) -> dict[str, _Tensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string(_MAX_NAME_BYTES)
            dims = self._scalar("I")
            if name in places:
                raise self._malformed(f"tensor `{name}` is there twice")
            if not 1 <= dims <= _MAX_DIMS:
                raise self._malformed(f"tensor `{name}` has {dims} dimensions")
            shape = tuple(self._scalar("Q") for _ in range(dims))
            places[name] = (shape[::-1], self._scalar("I"), self._scalar("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_HEADER_BYTES or alignment & (alignment - 1):
            raise self._malformed(f"alignment {alignment!r:.40} is not a power of two")
        start = math.ceil(self._at / alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in places.items():
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"tensor `{name}` of `{self.path}` has unknown type {kind}",
                    "download it again, or update the `gguf` package if the type is new",
                ) from error
            elements = math.prod(shape)
            if elements == 0 or shape[-1] % block or offset % alignment:
                raise self._malformed(f"tensor `{name}` has shape {shape} in blocks of {block}, offset {offset}")
            length = elements // block * block_bytes
            if start + offset + length > len(self._map):
                raise InputError(
                    f"truncated GGUF: `{self.path}`: tensor `{name}` needs {length} bytes at {start + offset}, "
                    f"the file has {len(self._map)}",
                    "download it again",
                )
            tensors[name] = _Tensor(shape, kind, start + offset, length)
        self._refuse_overlaps(tensors)
        return tensors

    def _refuse_overlaps(self, tensors: dict[str, _Tensor]) -> None:
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self._malformed(f"tensor `{name}` overlaps another")
            end = tensor.offset + tensor.length

    def _take(self, size: int) -> bytes:
        if size > self._end - self._at:
            raise self._malformed(
                "it ends inside its header" if self._end == len(self._map) else "its header exceeds 256 MiB"
            )
        data = self._map[self._at : self._at + size]
        self._at += size
        return data

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _string(self, limit: int = _MAX_HEADER_BYTES) -> str:
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
            if length * 8 > self._end - self._at:
                raise self._malformed(f"an array of {length} strings")
            return [self._string() for _ in range(length)]
        if kind not in _SCALARS:
            raise self._malformed(f"an array of type {kind}")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        return np.frombuffer(self._take(length * dtype.itemsize), dtype)

    def _malformed(self, reason: str) -> InputError:
        return InputError(f"malformed GGUF: `{self.path}`: {reason}", "download it again")
