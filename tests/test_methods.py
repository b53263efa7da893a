"""Calibrated methods: statistics against PyTorch, transforms that change nothing, rounding that beats rounding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmfast import registry
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError
from llmfast.export.stage import export
from llmfast.graph.fold import Rescaling, find_fold_sites
from llmfast.graph.linear import find_linears
from llmfast.graph.model import OnnxModel
from llmfast.graph.packed import Grid
from llmfast.infer.engine import Engine
from llmfast.quantize.calibrate import Calibration, Calibrator, Statistics
from llmfast.quantize.rounding import gptq, rtn
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.quantize.transforms import smoothquant
from llmfast.tokenizer import Tokenizer
from tests.tiny_encoder import save_encoder

ROUNDINGS = registry.names("quantize.rounding")
TRANSFORMS = registry.names("quantize.transforms")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    words = np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint8).tobytes().decode()
    path.write_text("\n".join(words[start : start + 60] for start in range(0, len(words), 60)), encoding="utf-8")
    return path


def _statistics(features: int, tokens: int = 400, seed: int = 0) -> Statistics:
    """Activations whose channels are correlated and differ in size, as real ones do."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tokens, features)) @ rng.standard_normal((features, features)) / np.sqrt(features)
    rows = (rows * np.exp(rng.standard_normal(features))).astype(np.float32)
    return Statistics(tokens, np.abs(rows).max(0), rows.T @ rows / tokens)


def _output_error(weight: np.ndarray, rounded: np.ndarray, statistics: Statistics) -> float:
    difference = (weight - rounded).astype(np.float64)
    return float(np.einsum("nk,kl,nl->", difference, statistics.gram.astype(np.float64), difference))


def test_statistics_are_those_of_pytorch(checkpoints: Callable[[str], Path], fp32_bundle: Path, text: Path) -> None:
    bundle = ModelBundle.open(fp32_bundle)
    model = OnnxModel.load(bundle.model)
    linear = next(one for one in find_linears(model) if one.name.endswith("layers.1.mlp.down_proj"))
    calibration = Calibration(text, num_samples=3, seq_len=32)
    measured = Calibrator(model, bundle, calibration, [linear.input]).measure([linear.input], True, lambda: None)

    reference = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied"), attn_implementation="eager").eval()
    seen = []
    reference.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    ids = Tokenizer.load(fp32_bundle).encode(text.read_text())[: 3 * 32]
    with torch.no_grad():
        for window in np.array(ids).reshape(3, 32):
            reference(torch.from_numpy(window[None]))
    rows = torch.cat(seen).double().numpy()
    statistics = measured[linear.input]
    assert statistics.num_tokens == 96
    np.testing.assert_allclose(statistics.abs_max, np.abs(rows).max(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(statistics.gram, rows.T @ rows / 96, rtol=1e-2, atol=1e-3)


def test_multiplied_statistics_are_those_of_multiplied_activations() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    factors = np.linspace(0.5, 2, 8, dtype=np.float32)
    one = Statistics(50, np.abs(rows).max(0), rows.T @ rows / 50).multiplied(factors)
    rows = rows * factors
    np.testing.assert_allclose(one.abs_max, np.abs(rows).max(0), rtol=1e-6)
    np.testing.assert_allclose(one.gram, rows.T @ rows / 50, rtol=1e-4, atol=1e-5)


def test_fold_sites_are_the_norms_and_the_product(fp32_bundle: Path) -> None:
    model = OnnxModel.load(ModelBundle.open(fp32_bundle).model)
    linears = [linear for linear in find_linears(model) if linear.output != "logits"]
    sites = {site.activations: site for site in find_fold_sites(model, linears)}
    assert set(sites) == {
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("input_layernorm", "post_attention_layernorm", "mlp.product")
    }
    product = sites["model.layers.0.mlp.product"]
    assert product.rows_of is not None
    assert product.rows_of.name == "model.layers.0.mlp.up_proj"
    norm = sites["model.layers.1.post_attention_layernorm"]
    assert norm.vectors == ("model.layers.1.post_attention_layernorm.weight",)
    assert [linear.role for linear in norm.linears] == ["gate_proj", "up_proj"]


def test_rescaling_leaves_the_function_as_it_is(
    fp32_bundle: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random factors instead of SmoothQuant's: the logits stay those of plain int8, up to its rounding."""

    def random_factors(sites, statistics, read, rescaling, options) -> None:
        rng = np.random.default_rng(0)
        for site in sites:
            rescaling.divide(site, np.exp(0.3 * rng.standard_normal(site.linears[0].shape[1])).astype(np.float32))

    monkeypatch.setattr(smoothquant, "transform", random_factors)
    options = QuantizeOptions("int8", "smoothquant", calibration=Calibration(text, 2, 32))
    bundle = quantize(fp32_bundle, tmp_path / "out", options)
    ids = np.random.default_rng(0).integers(3, 259, 48)
    expected = Engine(ModelBundle.open(fp32_bundle)).score(ids)
    assert np.corrcoef(expected.ravel(), Engine(bundle).score(ids).ravel())[0, 1] > 0.995


def test_smoothquant_uses_its_formula(fp32_bundle: Path) -> None:
    model = OnnxModel.load(ModelBundle.open(fp32_bundle).model)
    linears = [linear for linear in find_linears(model) if linear.output != "logits"]
    site = find_fold_sites(model, linears)[1]
    abs_max = np.linspace(0, 4, site.linears[0].shape[1], dtype=np.float32)
    rescaling = Rescaling()
    smoothquant.transform(
        [site],
        {site.activations: Statistics(1, abs_max)},
        lambda linear: linear.read(model),
        rescaling,
        smoothquant.Options(alpha=0.6),
    )
    weights = np.max([np.abs(linear.read(model)).max(0) for linear in site.linears], axis=0).astype(np.float64)
    expected = abs_max.astype(np.float64) ** 0.6 / weights**0.4
    expected[0] = 1  # a channel that was never used says nothing
    np.testing.assert_allclose(rescaling.columns[site.linears[0].weight], expected, rtol=1e-5)
    np.testing.assert_allclose(rescaling.vectors[site.vectors[0]], 1 / expected, rtol=1e-5)


@pytest.mark.parametrize(
    "grid", [Grid(4, 32, False), Grid(4, 32, True), Grid(4, 128, False), Grid(8), Grid(2, 32, False)]
)
@pytest.mark.parametrize("features", [128, 80])
def test_gptq_keeps_outputs_better_than_rounding_to_nearest(grid: Grid, features: int) -> None:
    weight = np.random.default_rng(1).standard_normal((48, features)).astype(np.float32)
    statistics = _statistics(features)
    plain = rtn.quantize_weight(weight, grid, rtn.Options())
    better = gptq.quantize_weight(weight, grid, gptq.Options(), statistics)
    again = gptq.quantize_weight(weight, grid, gptq.Options(), statistics)
    np.testing.assert_array_equal(better.codes, again.codes)
    assert better.codes.max() <= grid.largest
    assert (better.zero_points is None) == grid.symmetric
    ratio = _output_error(weight, better.dequantize(), statistics) / _output_error(
        weight, plain.dequantize(), statistics
    )
    assert ratio < 0.7


def test_gptq_is_its_definition() -> None:
    """Against the textbook loop in float64: round a column, spread its error through the updated inverse Hessian."""
    rng = np.random.default_rng(0)
    features = 40
    weight, statistics = rng.standard_normal((6, features)).astype(np.float32), _statistics(features)
    grid, options = Grid(4, 16, False), gptq.Options()
    ours = gptq.quantize_weight(weight, grid, options, statistics)
    gram = statistics.gram.astype(np.float64)
    order = np.argsort(-np.diag(gram), kind="stable")
    hessian = gram[np.ix_(order, order)] + np.eye(features) * options.damping * np.trace(gram) / features
    inverse = np.linalg.inv(hessian)
    left = weight[:, order].astype(np.float64)
    expected = np.empty_like(left)
    for column in range(features):
        block = order[column] // 16
        scale, zero = ours.scales[:, block].astype(np.float64), ours.zero_points[:, block].astype(np.float64)
        code = np.clip(np.rint(left[:, column] / scale) + zero, 0, 15)
        expected[:, column] = (code - zero) * scale
        error = (left[:, column] - expected[:, column]) / inverse[column, column]
        left[:, column:] -= np.outer(error, inverse[column, column:])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    restored = np.empty_like(expected)
    restored[:, order] = expected
    # Float32 may round a value that lies on the edge between two codes the other way.
    assert np.isclose(ours.dequantize(), restored, atol=1e-5).mean() > 0.98


def test_gptq_survives_channels_that_are_never_used(capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    empty = Statistics(4, np.zeros(64, np.float32), np.zeros((64, 64), np.float32))
    rounded = gptq.quantize_weight(weight, Grid(4, 32, False), gptq.Options(), empty)
    assert "singular statistics" in capsys.readouterr().err
    np.testing.assert_array_equal(rounded.codes, rtn.quantize_weight(weight, Grid(4, 32, False), rtn.Options()).codes)
    single = np.zeros((64, 64), np.float32)
    single[3, 3] = 1
    rounded = gptq.quantize_weight(weight, Grid(4, 32, False), gptq.Options(), Statistics(4, single[3], single))
    assert np.isfinite(rounded.dequantize()).all()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("method", [*TRANSFORMS, *ROUNDINGS, *(f"{one},gptq" for one in TRANSFORMS)])
def test_every_method_works_on_a_decoder(
    scheme: str, method: str, fp32_bundle: Path, tmp_path: Path, text: Path
) -> None:
    options = QuantizeOptions(scheme, method, calibration=Calibration(text, 4, 64))
    for name in ("one", "two"):
        bundle = quantize(fp32_bundle, tmp_path / name, options)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    step = bundle.manifest.lineage[-1]
    assert set(step.method.partition(":")[2].split(",")) >= set(method.split(","))
    if method != "rtn":
        assert step.calibration is not None
        assert step.calibration["num_samples"] == 4
    ids = np.array(Tokenizer.load(fp32_bundle).encode(text.read_text()))[300:348]
    expected, actual = Engine(ModelBundle.open(fp32_bundle)).score(ids), Engine(bundle).score(ids)
    assert np.corrcoef(expected.ravel(), actual.ravel())[0, 1] > (0.995 if scheme == "int8" else 0.85)


def test_statistics_in_several_passes_change_nothing(
    fp32_bundle: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantizeOptions("int4", "gptq", calibration=Calibration(text, 2, 64))
    quantize(fp32_bundle, tmp_path / "one", options)
    monkeypatch.setattr("llmfast.quantize.stage._GRAM_BYTES", 1)
    quantize(fp32_bundle, tmp_path / "many", options)
    assert (tmp_path / "one" / "model.onnx").read_bytes() == (tmp_path / "many" / "model.onnx").read_bytes()


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_encoders_are_calibrated_line_by_line(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_encoder(tmp_path / "checkpoint")
    bundle = export(str(tmp_path / "checkpoint"), tmp_path / "fp32")
    lines = tmp_path / "lines.txt"
    lines.write_text("a first line\nand a second one\n\na third\n", encoding="utf-8")
    small = quantize(bundle.path, tmp_path / "int8", QuantizeOptions("int8", method, calibration=Calibration(lines, 3)))
    assert small.manifest.lineage[-1].calibration["num_samples"] == 3
    # A norm after the sum feeds the residual too, so there is nothing to fold into, and it is said.
    assert ("nothing to rescale" in capsys.readouterr().err) == (method == "smoothquant")


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        ("gptq", {}, "gptq need --calibration"),
        ("gptq,smoothquant", {}, "not transforms first"),
        ("rtn,gptq", {}, "not transforms first"),
        ("smoothquant,smoothquant", {}, "not transforms first"),
        ("gptqq", {}, "unknown method `gptqq`"),
        ("smoothquant", {"beta": "1"}, "no option `beta`"),
        ("smoothquant", {"gptq.alpha": "1"}, r"no option `gptq\.alpha`"),
    ],
)
def test_impossible_methods_are_refused(
    method: str, settings: dict, reason: str, fp32_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=reason):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", method, settings))


def test_too_little_text_is_said(fp32_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match="tokens"):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", "gptq", calibration=Calibration(text)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]
