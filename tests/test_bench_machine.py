"""llmfast bench: the machine, its disturbances and energy, and where time goes."""

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from llmfast.bench import watch
from llmfast.bench.document import SCHEMA_VERSION, read_schema
from llmfast.bench.energy import open_meter
from llmfast.bench.options import BenchOptions
from llmfast.bench.profile import summarize_events
from llmfast.bench.roofline import measure_bandwidth
from llmfast.bench.stage import bench, print_document
from llmfast.bench.watch import Snapshot, describe_change


def test_disturbances_are_told(tmp_path: Path) -> None:
    before = Snapshot(busy=1000, total=2000, stolen=0, swapped=10, throttled=3)
    quiet = Snapshot(busy=1500, total=3000, stolen=1, swapped=20, throttled=3)
    assert describe_change(before, quiet, own=490) == []
    loud = Snapshot(busy=1900, total=3000, stolen=100, swapped=5000, throttled=5)
    warnings = describe_change(before, loud, own=400)
    assert [warning.split(" ")[1] for warning in warnings] == ["processes", "hypervisor", "processor", "machine"]
    assert "50% of the machine's time" in warnings[0]
    assert describe_change(None, loud, 0) == []
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  10 0 5 100 2 1 1 4 0 0\ncpu0 1\n")
    (tmp_path / "proc/vmstat").write_text("pswpin 3\npswpout 4\nnr_free 1\n")
    core = tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle"
    core.mkdir(parents=True)
    (core / "core_throttle_count").write_text("7\n")
    assert Snapshot.take(tmp_path) == Snapshot(busy=17, total=123, stolen=4, swapped=7, throttled=7)
    assert Snapshot.take(tmp_path / "nowhere") is None


def test_only_what_others_use_now_makes_a_machine_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_GLANCE_S", 0.0)
    for busy, warnings in ((52, 0), (90, 1)):
        own = iter([10, 60, 60])  # ticks of this process: it used 50 of 100 between the snapshots
        monkeypatch.setattr(watch, "_own_ticks", lambda _, own=own: next(own))
        counters = iter([Snapshot(0, 0, 0, 0, 0), Snapshot(busy, 100, 0, 0, 0)])
        found = watch.Watch.start(lambda counters=counters: next(counters))
        assert len(found._warnings) == warnings
    assert "other processes use 40%" in found._warnings[0]


def test_energy_is_read_from_rapl_and_else_estimated(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (tmp_path / "intel-rapl:0:0").mkdir()  # a core's share of the package, not to be counted twice
    (package / "max_energy_range_uj").write_text("999999")
    (package / "energy_uj").write_text("900000")
    meter = open_meter(["CPUExecutionProvider"], 3.5, powercap=tmp_path)
    before = meter.read()
    (package / "energy_uj").write_text("400000")  # it has wrapped
    assert meter.source == "rapl"
    assert meter.read() - before == pytest.approx(0.5)
    now = [2.0]
    meter = open_meter(["CPUExecutionProvider"], 3.5, cpu_time=lambda: now[0], powercap=tmp_path / "none")
    assert (meter.source, meter.read()) == ("estimate: CPU time x 3.5 W per core", 7.0)


@pytest.mark.parametrize(
    ("visible", "found"), [(None, ("index", 0)), ("3,1", ("index", 3)), ("GPU-5a,0", ("uuid", b"GPU-5a"))]
)
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_the_gpu_that_runs_the_model_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, provider: str, visible: str | None, found: tuple[str, Any]
) -> None:
    asked = []

    class Nvml:
        def __init__(self, library: str) -> None: ...

        def nvmlInit_v2(self) -> int:
            return 0

        def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:
            asked.append(("index", index))
            return 0

        def nvmlDeviceGetHandleByUUID(self, name: bytes, device: Any) -> int:
            asked.append(("uuid", name))
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, count: Any) -> int:
            count._obj.value = 2500  # millijoules
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = open_meter({"CPUExecutionProvider": 2, provider: 40}, 3.5, powercap=tmp_path)
    assert (meter.source, meter.read()) == ("nvml", 2.5)
    assert asked == [found]


def test_bandwidth_is_bytes_by_seconds_of_the_best_pass() -> None:
    times = iter(np.cumsum([0, 0.5, 0.1, 0.25, 0.1, 0.5, 0.1, 0.5, 0.1, 0.5]))
    assert measure_bandwidth(2, lambda: float(next(times)), size=1 << 20) == pytest.approx((1 << 20) / 0.25)


# Profiles


def test_events_are_summed_by_operator_and_role() -> None:
    def event(name: str, operator: str, start: int, took: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": took, "args": {"op_name": operator}}

    events = [
        event("model.layers.0.mlp.up_proj", "MatMul", 5, 100),  # before the phase
        event("model.layers.0.mlp.up_proj", "MatMul", 10, 20),
        event("model.layers.1.mlp.up_proj", "MatMul", 40, 40),
        event("Memcpy", "MemcpyToHost", 90, 6),
        {"cat": "Session", "name": "model_run", "ts": 20, "dur": 1000},
    ]
    phase = summarize_events(events, {f"model.layers.{n}.mlp.up_proj": "up_proj" for n in (0, 1)}, 10, 110, 2)
    assert phase["seconds"] == pytest.approx(50e-6)
    assert phase["operators"] == [
        {"name": "MatMul", "seconds": pytest.approx(30e-6), "calls": 1.0},
        {"name": "MemcpyToHost", "seconds": pytest.approx(3e-6), "calls": 0.5},
    ]
    assert [row["name"] for row in phase["roles"]] == ["up_proj", "copies between devices"]
    assert phase["copies"] == {"calls": 0.5, "seconds": pytest.approx(3e-6)}
    assert phase["outside_s"] == pytest.approx((100 - 66) / 2 * 1e-6)


def test_a_real_model_is_profiled_and_slowness_is_found(fp32_bundle: Path, tmp_path: Path, capsys: Any) -> None:
    copy = shutil.copytree(fp32_bundle, tmp_path / "copy")
    options = BenchOptions(
        prompt_tokens=300, output_tokens=6, rounds=2, warmup=0, threads=1, profile=True, price_per_hour=1.0
    )
    document = bench([fp32_bundle, copy], options).document()
    jsonschema.validate(json.loads(json.dumps(document)), read_schema())
    for row in document["rows"]:
        prefill, decode = row["profile"]["phases"]
        assert (prefill["phase"], prefill["unit"], decode["phase"], decode["unit"]) == (
            "prefill", "prompt", "decode", "token",
        )  # fmt: skip
        calls = {entry["name"]: entry["calls"] for entry in decode["operators"]}
        # Two layers; a token is one run, a prompt of 300 tokens two chunks of 256.
        assert calls["GroupQueryAttention"] == 2
        assert {entry["name"]: entry["calls"] for entry in prefill["operators"]}["GroupQueryAttention"] == 4
        assert {"down_proj", "qkv_proj", "attention", "norm"} <= {entry["name"] for entry in decode["roles"]}
        kernels = sum(entry["seconds"] for entry in decode["operators"])
        assert kernels + decode["outside_s"] == pytest.approx(decode["seconds"])
        assert row["roofline_share"] > 0
        tables = [layer for layer in row["layers"] if layer["role"] == "embedding"]
        assert row["bytes_per_token"] < sum(layer["bytes"] for layer in row["layers"]) * 2
        assert tables
    capsys.readouterr()
    print_document(document)
    printed = capsys.readouterr().out
    assert "decode, by operator" in printed
    assert "decode, by layer role" in printed
    assert "no copies between devices" in printed
    assert "MB are read for a token" in printed
    assert document["schema_version"] == SCHEMA_VERSION
