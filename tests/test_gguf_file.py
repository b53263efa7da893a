"""GGUF headers, sound and damaged, and the de-quantization of tensors."""

import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmfast.errors import InputError, UnsupportedError
from llmfast.export.gguf_file import GgufFile
from tests.tiny_gguf import finish


def _header(tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def _key(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _entry(kind: int, value: bytes, key: bytes = b"a") -> bytes:
    return _key(key) + struct.pack("<I", kind) + value


def _tensor(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return _key(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_ALIGNMENT = b"general.alignment"
_PADDING = b"\0" * 256
DAMAGED = {
    "empty": (b"", InputError, "empty file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", InputError, "Git LFS pointer"),
    "html": (b"<html>", InputError, "not a GGUF file"),
    "magic-only": (b"GGUF", InputError, "ends inside its header"),
    "version-0": (_header(version=0), UnsupportedError, "version 0"),
    "version-1": (_header(version=1), UnsupportedError, "version 1"),
    "version-99": (_header(version=99), UnsupportedError, "version 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
    "entries": (_header(entries=2**64 - 1), InputError, "18446744073709551615 keys, more than fit"),
    "tensors": (_header(tensors=2**64 - 1), InputError, "more than fit"),
    "counts-overflow": (_header(2**63, 2**63), InputError, "more than fit"),
    "key-length": (_header(entries=1) + struct.pack("<QQ", 2**63, 0), InputError, "a string of"),
    "empty-key": (_header(entries=1) + _entry(0, b"\1", b"") + b"\0", InputError, "is empty"),
    "key-twice": (_header(entries=2) + 2 * _entry(0, b"\1"), InputError, "key `a` is empty or there twice"),
    "value-type": (_header(entries=1) + _entry(77, b"\0"), InputError, "value type 77"),
    "string-length": (_header(entries=1) + _entry(8, struct.pack("<Q", 2**64 - 1)), InputError, "a string of"),
    "string-end": (_header(entries=1) + _entry(8, struct.pack("<Q", 4096)), InputError, "ends inside"),
    "array-numbers": (_header(entries=1) + _entry(9, struct.pack("<IQ", 4, 2**62)), InputError, "ends inside"),
    "array-strings": (_header(entries=1) + _entry(9, struct.pack("<IQ", 8, 2**61)), InputError, "an array of"),
    "array-of-arrays": (_header(entries=1) + _entry(9, struct.pack("<IQ", 9, 1)), InputError, "an array of type 9"),
    "array-type": (_header(entries=1) + _entry(9, struct.pack("<IQ", 13, 1)), InputError, "an array of type 13"),
    "alignment-0": (_header(1, 1) + _entry(4, b"\0\0\0\0", _ALIGNMENT) + _tensor(), InputError, "alignment 0"),
    "alignment-3": (_header(1, 1) + _entry(4, b"\3\0\0\0", _ALIGNMENT) + _tensor(), InputError, "alignment 3"),
    "alignment-big": (
        _header(1, 1) + _entry(10, struct.pack("<Q", 2**63), _ALIGNMENT) + _tensor(),
        InputError,
        "align",
    ),
    "alignment-text": (_header(1, 1) + _entry(8, _key(b"32"), _ALIGNMENT) + _tensor(), InputError, "alignment '32'"),
    "alignment-bool": (_header(1, 1) + _entry(7, b"\1", _ALIGNMENT) + _tensor(), InputError, "alignment True"),
    "name-long": (_header(1) + _tensor(b"x" * 65), InputError, "a string of 65 bytes"),
    "tensor-twice": (_header(2) + 2 * _tensor(), InputError, "`t` is there twice"),
    "rank-0": (_header(1) + _tensor(shape=()) + _PADDING, InputError, "0 dimensions"),
    "rank-5": (_header(1) + _tensor(shape=(1,) * 5), InputError, "5 dimensions"),
    "rank-huge": (_header(1) + _key(b"t") + struct.pack("<I", 2**32 - 1) + _PADDING, InputError, "dimensions"),
    "size-0": (_header(1) + _tensor(shape=(0,)) + _PADDING, InputError, "has shape"),
    "size-overflow": (_header(1) + _tensor(shape=(2**63, 2**63)), InputError, "truncated GGUF"),
    "blocks": (_header(1) + _tensor(shape=(31,), kind=2), InputError, "in blocks of 32"),
    "type": (_header(1) + _tensor(kind=9999), InputError, "unknown type 9999"),
    "removed-type": (_header(1) + _tensor(kind=4), InputError, "unknown type 4"),
    "offset-odd": (_header(1) + _tensor(offset=1) + _PADDING, InputError, "offset 1"),
    "offset-huge": (_header(1) + _tensor(offset=2**64 - 32) + _PADDING, InputError, "truncated GGUF"),
    "no-data": (_header(1) + _tensor(), InputError, "truncated GGUF.*`t` needs 128 bytes"),
    "overlap": (
        _header(2) + _tensor() + _tensor(b"u", offset=64) + b"\0" * 1024,
        InputError,
        "`u` overlaps another",
    ),
    "one-part": (_header(0, 1) + _entry(2, struct.pack("<H", 3), b"split.count"), UnsupportedError, "one of 3 parts"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_headers_are_refused(name: str, tmp_path: Path) -> None:
    content, error, reason = DAMAGED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=reason):
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def _sound(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_bool("a.flag", True)
    writer.add_array("a.texts", ["one", "", "zwölf"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_float64("a.double", 0.1)
    for index in range(3):
        writer.add_tensor(f"blk.{index}", np.arange(33 * 2, dtype=np.float32).reshape(33, 2) + index)
    return finish(writer, path)


def test_headers_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    path = _sound(tmp_path / "model.gguf")
    file = GgufFile(path)
    assert file.metadata["a.number"] == 7
    assert file.metadata["a.flag"] is True
    assert file.metadata["a.texts"] == ["one", "", "zwölf"]
    assert file.metadata["a.numbers"].tolist() == [1, -2, 3]
    assert file.metadata["a.double"] == 0.1
    for tensor in gguf.GGUFReader(path).tensors:
        np.testing.assert_array_equal(file.read(tensor.name), tensor.data)


def test_a_damaged_byte_ends_in_an_error_or_in_a_sound_reading(tmp_path: Path) -> None:
    sound = _sound(tmp_path / "sound.gguf").read_bytes()
    rng, path = random.Random(0), tmp_path / "model.gguf"
    for _ in range(2000):
        content = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content) // 2)] = rng.choice((0, 1, 8, 9, 127, 128, 255))
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            file = GgufFile(path)
        except (InputError, UnsupportedError):
            continue
        for name in file.tensors:
            assert file.read(name).dtype == np.float32


def test_a_long_header_of_rubbish_is_refused_in_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(_header(entries=1) + _entry(9, struct.pack("<IQ", 8, 130_000)) + b"\0" * (1 << 20))
    program = (
        "import resource, sys; from pathlib import Path; from llmfast.export.gguf_file import GgufFile\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "GgufFile(Path(sys.argv[1]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 20 << 10  # KiB


_WRITABLE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
_READABLE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_M")


@pytest.mark.parametrize("kind", [*_WRITABLE, *_READABLE])
def test_tensors_are_dequantized_as_the_package_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmfast.export.gguf_file._VALUES_AT_ONCE", 1000)  # several chunks, the last one shorter
    quantized = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    if kind in _WRITABLE:
        data = gguf.quants.quantize(rng.standard_normal((7, 512), np.float32), quantized)
    else:
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantized]
        data = rng.integers(0, 256, (7, 512 // block * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("t", data, raw_dtype=quantized)
    values = GgufFile(finish(writer, tmp_path / "model.gguf")).read("t")
    with np.errstate(invalid="ignore"):  # random bytes are also scales that are no numbers
        expected = gguf.quants.dequantize(data, quantized).reshape(7, 512)
    np.testing.assert_array_equal(values, expected)


def test_integers_are_refused_when_they_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("t", np.arange(8, dtype=np.int32))
    with pytest.raises(UnsupportedError, match=r"tensor `t` of .* has type I32"):
        GgufFile(finish(writer, tmp_path / "model.gguf")).read("t")
