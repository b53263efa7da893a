"""An int8 KV cache: against PyTorch with a cache rounded the same way, and what has none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError, UnsupportedError
from llmfast.export.stage import export
from llmfast.graph.feeds import graph_inputs, sequence_feeds
from llmfast.graph.model import OnnxModel
from llmfast.infer.engine import Engine
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.corpus import SHIPPED_HELD_OUT, Corpus
from llmfast.quantize.kv_cache import cached_values, measure_ranges, quantize_cache
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.replay import Replay
from llmfast.quantize.stage import quantize
from llmfast.quantize.summary import figure_columns
from llmfast.runtime import open_session
from tests.tiny_encoder import save_encoder

PROMPT = np.random.default_rng(3).integers(0, 259, 40)


class RoundedCache(DynamicCache):
    """PyTorch's cache, with keys and values rounded to codes of 8 bits as they come in."""

    def __init__(self, ranges: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.ranges = ranges

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        rounded = []
        for name, tensor in (("key", keys), ("value", values)):
            scale = torch.from_numpy(self.ranges[f"present.{layer}.{name}"] / np.float32(127))[None, :, None]
            rounded.append(torch.clamp(torch.round(tensor / scale), -128, 127) * scale)
        return super().update(*rounded, layer, *args, **kwargs)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint8).tobytes())
    return path


def _calibration(text: Path) -> Calibration:
    return Calibration(text, num_samples=2, seq_len=64)


def _with_int8_cache(bundle: ModelBundle, text: Path) -> tuple[ModelBundle, dict[str, np.ndarray]]:
    model = OnnxModel.load(bundle.model)
    inputs = graph_inputs(model.proto.graph)
    samples = [sequence_feeds(inputs, ids[None]) for ids in _calibration(text).split(bundle)[0]]
    ranges = measure_ranges(cached_values(model), Replay(model, samples, {}))
    quantize_cache(model.proto, ranges)
    path = text.parent / "int8.onnx"
    onnx.save(model.proto, path)
    return replace(bundle, model=path), ranges


@pytest.mark.parametrize("name", ["llama-tied", "llama-one-kv-head", "mistral-sliding", "qwen3"])
def test_logits_are_those_of_pytorch_over_a_rounded_cache(
    name: str, checkpoints: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    bundle, ranges = _with_int8_cache(export(str(checkpoints(name)), tmp_path / "fp32"), text)
    engine = Engine(bundle, threads=1, max_length=64, chunk_tokens=16)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints(name), attn_implementation="eager").eval()
    with torch.inference_mode():
        cache = RoundedCache(ranges)
        expected = reference(torch.from_numpy(PROMPT)[None], past_key_values=cache).logits[0].numpy()
        float_logits = reference(torch.from_numpy(PROMPT)[None]).logits[0].numpy()
    scores = engine.score(PROMPT)
    engine.reset()
    stepwise = [engine.prefill(PROMPT[:30]), *(engine.decode(int(token)).copy() for token in PROMPT[30:])]
    # A value half-way between two codes may round either way, so a few positions may differ by a step.
    scale = np.abs(expected).max()
    assert np.abs(scores - expected).mean() < 1e-3 * scale
    assert np.abs(np.array(stepwise) - expected[29:]).mean() < 1e-3 * scale
    assert np.abs(float_logits - expected).mean() > 1e-5 * scale  # rounding does something


def test_the_cache_holds_bytes(fp32_bundle: Path, text: Path) -> None:
    bundle, _ = _with_int8_cache(ModelBundle.open(fp32_bundle), text)
    engine = Engine(bundle, threads=1, max_length=64)
    past = [entry for entry in engine.session.get_inputs() if entry.name.startswith("past_key_values.")]
    assert len(past) == 4
    assert {entry.type for entry in past} == {"tensor(int8)"}


def test_an_encoder_has_no_cache(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", "bert", "AutoModel")
    bundle = export(str(tmp_path / "encoder"), tmp_path / "fp32")
    with pytest.raises(UnsupportedError, match="no KV cache"):
        cached_values(OnnxModel.load(bundle.model))


def test_quantize_stores_the_cache_as_int8(fp32_bundle: Path, text: Path, tmp_path: Path) -> None:
    options = QuantizeOptions("int8", calibration=_calibration(text), kv="int8")
    bundle = quantize(fp32_bundle, tmp_path / "int8", options)
    engine = Engine(bundle, threads=1, max_length=64)
    past = [entry for entry in engine.session.get_inputs() if entry.name.startswith("past_key_values.")]
    assert {entry.type for entry in past} == {"tensor(int8)"}
    step = bundle.manifest.lineage[-1]
    assert step.options["kv"] == bundle.manifest.measured["quantize"]["kv"] == "int8"
    assert "KV cache" in [column.title for column in figure_columns(bundle.manifest.measured["quantize"])]
    assert step.calibration is not None
    assert bundle.manifest.measured["quantize"]["kld"] < 0.5
    plain = Engine(ModelBundle.open(fp32_bundle), threads=1, max_length=64).score(PROMPT)
    assert np.abs(engine.score(PROMPT) - plain).mean() < 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("method", ["rtn", "rotate", "rotate,gptq"])
def test_scales_are_those_of_the_values_that_are_cached(
    method: str, fp32_bundle: Path, text: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions("w8", method, calibration=_calibration(text), measure=False)
    plain = quantize(fp32_bundle, tmp_path / "plain", options)
    bundle = quantize(fp32_bundle, tmp_path / "int8", replace(options, kv="int8"))
    scales = {name: array for name, array in _constants(bundle.model).items() if name.endswith(".scale")}
    session = open_session(plain.model)
    values = [
        session.run(cached_values(OnnxModel.load(plain.model)), sequence_feeds(session.get_inputs(), ids[None]))
        for ids in _calibration(text).split(plain)[0]
    ]
    assert len(scales) == 4
    for name, *samples in zip(cached_values(OnnxModel.load(plain.model)), *values, strict=True):
        expected = np.abs(np.concatenate(samples, axis=2)).max(axis=(0, 2)) / 127
        np.testing.assert_allclose(scales[f"{name}.scale"][0, :, 0], expected, rtol=0.05)  # weights are rounded here


def _constants(path: Path) -> dict[str, np.ndarray]:
    model = OnnxModel.load(path)
    return {name: model.read(tensor) for name, tensor in model.initializers.items()}


def test_text_that_scales_were_measured_on_proves_nothing(fp32_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("abcdefgh" * 16, encoding="ascii")  # two windows, which leaves none over
    bundle = quantize(fp32_bundle, tmp_path / "int8", QuantizeOptions("w8", calibration=_calibration(text), kv="int8"))
    assert bundle.manifest.measured["quantize"]["text"]["name"] == Corpus(SHIPPED_HELD_OUT).describe()["name"]


def test_an_unknown_cache_format_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown KV cache format `int4`"):
        QuantizeOptions("int8", kv="int4")
