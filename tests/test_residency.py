"""Mapped weight files are given back while they are read, and nothing of them changes."""

import mmap
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmfast.quantize.spool import Spool
from llmfast.residency import bounded_residency, resident_file_bytes, unchanged_mappings

_MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_a_file_larger_than_the_limit_is_read_within_it(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).integers(0, 256, 64 * _MIB, np.uint8)
    expected.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    before = resident_file_bytes()
    assert int(mapped.sum(dtype=np.int64)) == int(expected.sum(dtype=np.int64))
    assert resident_file_bytes() - before > 60 * _MIB
    with bounded_residency(tmp_path, before + 8 * _MIB):
        for _ in range(200):
            if resident_file_bytes() - before < 8 * _MIB:
                break
            time.sleep(0.01)
        assert resident_file_bytes() - before < 8 * _MIB
        assert np.array_equal(mapped, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_pages_that_were_changed_are_never_given_back(tmp_path: Path) -> None:
    for name in ("kept", "changed"):
        (tmp_path / name).write_bytes(bytes(_MIB))
    kept = np.memmap(tmp_path / "kept", np.uint8, "r")
    changed = np.memmap(tmp_path / "changed", np.uint8, "c")  # private: what is written is in no file
    assert kept.sum() == changed.sum() == 0
    assert len(unchanged_mappings(tmp_path)) == 2
    changed[5] = 7
    assert unchanged_mappings(tmp_path) == [(kept.ctypes.data, _MIB)]
    assert unchanged_mappings(tmp_path / "kept") == [(kept.ctypes.data, _MIB)]
    assert _MIB % mmap.PAGESIZE == 0
    with bounded_residency(tmp_path, 0):
        time.sleep(0.05)
    assert changed[5] == 7


def test_arrays_beyond_the_memory_of_a_spool_come_back_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arrays = [np.full((2, 8), number, np.float32) for number in range(4)]
    spool = Spool(held_bytes=2 * arrays[0].nbytes)
    for number, array in enumerate(arrays):
        spool.put(number, "hidden", array)
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    column = spool.column("hidden", len(arrays))
    assert all(np.array_equal(one, other) for one, other in zip(column, arrays, strict=True))
    spool.drop(0, "hidden")  # makes room in memory
    spool.put(0, "output", arrays[2])
    spool.drop(2, "hidden")
    assert np.array_equal(spool.get(0, "output"), arrays[2])
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    del spool, column
    assert not list(tmp_path.iterdir())
