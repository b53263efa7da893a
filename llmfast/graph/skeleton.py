"""What a graph looks like, read without the values of its weights: a file of any size in a few milliseconds."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError

from llmfast.errors import InputError
from llmfast.graph.guard import check_head, explain

# Field numbers of ModelProto.graph, GraphProto.initializer and TensorProto's values:
# https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_GRAPH = 7
_INITIALIZER = 5
_VALUES = (4, 5, 6, 7, 9, 10, 11)
_SMALL = 256  # bytes of a tensor that is read whole: shapes and axes decide what a graph does
# Bytes of a value by wire type; https://protobuf.dev/programming-guides/encoding/#structure
_FIXED = {1: 8, 5: 4}
_VARINT, _LENGTH = 0, 2


def read_skeleton(path: Path) -> onnx.ModelProto:
    """Return a model whose larger initializers have names, types and shapes, but no values.

    Raises:
        InputError: missing, truncated, or not ONNX.
        UnsafeInputError: no regular file.
    """
    check_head(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            message = b"".join(
                _spell(field, _without_weights(file, start, end)) if field == _GRAPH else _read(file, first, end)
                for field, first, start, end in _fields(file, 0, size)
            )
        return onnx.ModelProto.FromString(message)
    except (DecodeError, ValueError) as error:
        raise explain(error, path) from error
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error


def _without_weights(file: BinaryIO, start: int, end: int) -> bytes:
    return b"".join(
        _spell(field, _without_values(file, value, stop))
        if field == _INITIALIZER and stop - value > _SMALL
        else _read(file, first, stop)
        for field, first, value, stop in _fields(file, start, end)
    )


def _without_values(file: BinaryIO, start: int, end: int) -> bytes:
    kept = [(first, stop) for field, first, _, stop in _fields(file, start, end) if field not in _VALUES]
    return b"".join(_read(file, first, stop) for first, stop in kept)


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the fields of a message: number, and where tag, value and the next field begin."""
    position = start
    while position < end:
        file.seek(position)
        tag = _varint(file)
        field, wire = tag >> 3, tag & 7
        if wire == _LENGTH:
            length = _varint(file)
            value = file.tell()
        elif wire == _VARINT:
            value = file.tell()
            _varint(file)
            length = file.tell() - value
        else:
            value, length = file.tell(), _FIXED.get(wire, end)  # an unknown wire type leaves the message
        if value + length > end:
            raise ValueError("a field leaves its message")
        yield field, position, value, value + length
        position = value + length


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("the file ends within a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number of more than 64 bits")


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _spell(field: int, value: bytes) -> bytes:
    """Return a field of given bytes."""
    length = len(value)
    spelled = bytearray([field << 3 | _LENGTH])
    while length >= 0x80:
        spelled.append(length & 0x7F | 0x80)
        length >>= 7
    spelled.append(length)
    return bytes(spelled) + value
