"""doctor, and providers that are missing, bring a plugin, take nothing, or run a format slowly."""

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from llmfast import registry, resources, runtime
from llmfast.bundle import Manifest, ModelBundle, Step
from llmfast.cli import app
from llmfast.doctor import stage
from llmfast.errors import OptionError, UnsupportedError
from llmfast.infer.many import open_work
from llmfast.processor import saturates_int8
from llmfast.providers import openvino
from llmfast.runtime import open_session, placement, suit_provider, with_fallback
from llmfast.serve.model import ServedModel
from tests.tiny_decoder import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return ModelBundle.open(write_bundle(tmp_path_factory.mktemp("tiny")))


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _plugin(monkeypatch: pytest.MonkeyPatch, library: str, devices: list[Any]) -> None:
    """Put a package in the place of OpenVINO's, and devices in the place of this machine's."""
    package = ModuleType("onnxruntime_ep_openvino")
    package.get_library_path = lambda: library
    package.__spec__ = SimpleNamespace(loader=None)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", package)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)
    monkeypatch.setattr(runtime, "_REGISTERED", set())


def test_the_document_tells_machine_providers_and_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_READ_BYTES", 2**20)
    document = json.loads(_run("doctor", "--format", "json").stdout)
    machine = document["machine"]
    assert machine["cores"] == runtime.usable_cores()
    assert 0 < machine["available_bytes"] <= machine["memory_bytes"]
    assert machine["read_bytes_per_s"] > 1e8
    assert machine["saturates_int8"] is saturates_int8()
    assert document["wheels"]["onnxruntime"] == onnxruntime.__version__
    providers = {entry["name"]: entry for entry in document["providers"]}
    assert sorted(providers) == registry.names("providers")
    assert providers["cpu"] == {
        "name": "cpu",
        "works": True,
        "detail": "1 of 1 node on CPUExecutionProvider",
        "remedy": "",
    }
    assert {entry["name"] for entry in document["extras"]} >= {"cpu", "export", "tune"}
    for name, provider in providers.items():
        assert provider["works"] or (provider["detail"] and provider["remedy"]), name


@pytest.mark.parametrize("output_format", ["table", "md", "csv"])
def test_people_read_the_same(output_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_READ_BYTES", 2**20)
    result = _run("doctor", "--format", output_format)
    assert result.exit_code == 0
    for name in registry.names("providers"):
        assert name in result.stdout
    if output_format != "csv":
        assert "usable of" in result.stdout
    assert _run("doctor", "--format", "yaml").exit_code == 2


def test_wheels_that_overwrite_each_other_are_named() -> None:
    assert stage.describe_clash(["onnxruntime"]) is None
    remedy = stage.describe_clash(["onnxruntime", "onnxruntime-gpu"])
    assert remedy == "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"


def test_a_provider_that_opens_but_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(onnxruntime.InferenceSession):
        def run(self, *_: Any) -> list[Any]:
            return super().run(None, {"x": np.ones((3, 3), np.float32)})  # not what the graph takes

    monkeypatch.setattr(onnxruntime, "InferenceSession", Failing)
    cpu = next(check for check in stage.try_providers() if check.name == "cpu")
    assert not cpu.works
    assert re.match(r"a product on cpu fails: .*invalid dimensions", cpu.detail)
    assert cpu.remedy == "update its driver"


def test_doctor_tells_the_memory_that_others_plan_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_READ_BYTES", 2**20)
    monkeypatch.setenv(resources.MAX_MEMORY, f"{2**20} {os.getpid()}")
    assert stage.doctor().machine["available_bytes"] == 0


def test_extras_are_read_from_the_requirements() -> None:
    requirements = ["numpy>=1", 'onnx>=1; extra == "quick"', 'never-made==1; extra == "quick"', "rich; extra == 'slow'"]
    quick, slow = stage.list_extras([*requirements, "pytest; extra == 'dev'"])
    assert quick == stage.Extra("quick", False, ["never-made"], "pip install 'llmfast[quick]'")
    assert slow == stage.Extra("slow", True, [], "")


def test_every_provider_says_what_it_is_and_how_to_get_it() -> None:
    for name in registry.names("providers"):
        plugin = registry.load("providers", name)
        assert plugin.NAME.endswith("ExecutionProvider")
        assert "pip" in plugin.INSTALL or "build" in plugin.INSTALL
        assert all(isinstance(value, str) for value in plugin.provider_options(0).values())
        if hasattr(plugin, "PLUGIN_PACKAGE"):
            assert plugin.NEEDS


def test_a_missing_provider_is_an_error_unless_fallback_is_allowed(bundle: ModelBundle, tmp_path: Path) -> None:
    for provider in ("xnnpack", "qnn"):
        result = _run("infer", bundle.path, "--prompt", "ab", "--max-tokens", "2", "--provider", provider)
        assert result.exit_code == 5
        assert "hint: " in result.stderr
        assert result.stdout == ""
    arguments = ["infer", bundle.path, "--prompt", "ab", "--max-tokens", "2", "--provider", "xnnpack"]
    result = _run(*arguments, "--allow-fallback", "--format", "json")
    assert result.exit_code == 0, result.output
    assert "going on with cpu" in result.stderr
    assert set(json.loads(result.stdout)["placement"]) == {"CPUExecutionProvider"}
    with pytest.raises(OptionError, match="unknown provider"):
        with_fallback("abacus", True)
    assert with_fallback("cpu", True) == "cpu"


def test_a_plugin_without_a_device_says_what_it_needs(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, str]] = []
    _plugin(monkeypatch, "plugin.so", [SimpleNamespace(ep_name="CPUExecutionProvider", ep_metadata={})])
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *pair: registered.append(pair))
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="finds no device") as caught:
            open_session(bundle.model, "openvino")
        assert "Intel" in caught.value.hint
    assert registered == [("onnxruntime_ep_openvino", "plugin.so")]  # once


def test_a_plugin_that_does_not_load_is_unsupported(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    _plugin(monkeypatch, str(tmp_path / "broken.so"), [])
    with pytest.raises(UnsupportedError, match="does not load"):
        open_session(bundle.model, "openvino")


def test_a_provider_that_takes_no_node_is_an_error(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    # ONNX Runtime lists its own CPU kernels as a device too: they stand in for a plugin, under another name.
    devices = onnxruntime.get_ep_devices()
    _plugin(monkeypatch, "plugin.so", devices)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *pair: None)
    monkeypatch.setattr(openvino, "is_fit", lambda device: True)
    with pytest.raises(UnsupportedError, match="runs no node"):
        open_session(bundle.model, "openvino")
    monkeypatch.setattr(openvino, "NAME", "CPUExecutionProvider")
    assert placement(open_session(bundle.model, "openvino")).keys() == {"CPUExecutionProvider"}


def _quantized(bundle: ModelBundle, method: str, **options: Any) -> ModelBundle:
    step = Step("quantize", method, options, {})
    return ModelBundle(bundle.path, Manifest("text-generation", lineage=(step,)), bundle.model)


def test_formats_that_a_provider_runs_slowly_are_refused(
    bundle: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    dynamic = _quantized(bundle, "int8:smoothquant,rtn", int8={"activations": "dynamic"})
    for provider in ("cuda", "openvino", "tensorrt"):
        with pytest.raises(UnsupportedError, match="int8 with dynamic activations") as caught:
            suit_provider(dynamic, provider)
        assert "--scheme" in caught.value.hint
        assert suit_provider(dynamic, f"{provider},cpu") == "cpu"
        assert "going on with cpu" in capsys.readouterr().err
    assert suit_provider(dynamic, "cpu") == "cpu"
    assert suit_provider(_quantized(bundle, "int8:rtn", int8={"activations": "static"}), "openvino") == "openvino"
    assert suit_provider(_quantized(bundle, "int4:gptq", int4={"block_size": 32}), "cuda") == "cuda"
    assert suit_provider(bundle, "cuda,cpu") == "cuda,cpu"


def test_files_and_the_server_refuse_slow_formats_too(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = _quantized(bundle, "int8:rtn", int8={"activations": "dynamic"})
    monkeypatch.setattr(ModelBundle, "open", lambda path: dynamic)
    with pytest.raises(UnsupportedError, match="int8 with dynamic activations"):
        open_work(dynamic, "cuda", 1, None)
    with pytest.raises(UnsupportedError, match="int8 with dynamic activations"):
        ServedModel(dynamic.path, "cuda", 1, None, None)


def test_encoder_decoders_fall_back_to_the_cpu(bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    graphs = {role: {"file": f"{role}.onnx"} for role in ("encoder", "decoder")}
    pair = ModelBundle(bundle.path, Manifest("translation", graphs=graphs), bundle.model)
    assert suit_provider(pair, "cpu") == "cpu"
    assert suit_provider(pair, "cuda,openvino,cpu") == "cpu"
    assert "`cuda` can't run encoder-decoders yet; going on with openvino,cpu" in capsys.readouterr().err
    with pytest.raises(UnsupportedError, match="`cuda` can't run encoder-decoders"):
        suit_provider(pair, "cuda")
