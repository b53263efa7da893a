"""Calibrated methods: statistics against PyTorch, transforms that change nothing, rounding that beats rounding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM

from llmfast import registry
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.export.stage import export
from llmfast.graph.feeds import graph_inputs, sequence_feeds
from llmfast.graph.fold import divide, find_fold_sites
from llmfast.graph.linear import find_linears
from llmfast.graph.model import OnnxModel
from llmfast.graph.packed import Grid
from llmfast.graph.rotation import random_rotation
from llmfast.infer.engine import Engine
from llmfast.quantize.calibrate import Calibration, Statistics
from llmfast.quantize.plan import Plan, choose_layers
from llmfast.quantize.rounding import gptq, hqq, rtn
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.quantize.transforms import awq, rotate, smoothquant
from llmfast.quantize.workpiece import InputStatistics, Workpiece
from llmfast.tokenizer import Tokenizer
from tests.tiny_encoder import save_encoder

CODED = [name for name in registry.names("quantize.schemes") if name not in ("fp16", "bf16")]
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


def _workpiece(bundle: Path, samples: list[np.ndarray], scheme: str = "int4") -> Workpiece:
    model = OnnxModel.load(ModelBundle.open(bundle).model)
    inputs = graph_inputs(model.proto.graph)
    feeds = [sequence_feeds(inputs, ids[None]) for ids in samples]
    return Workpiece(model, choose_layers(model, Plan.make(scheme, "rtn", {}), "", ""), feeds)


def _windows(count: int = 3, length: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(5).integers(3, 259, (count, length)))


def _inputs_in_pytorch(model: torch.nn.Module, layer: str, windows: list[np.ndarray]) -> np.ndarray:
    """Return what a layer of a PyTorch model is given, float64 [tokens, K]."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    with torch.no_grad():
        for window in windows:
            model(torch.from_numpy(window[None]))
    hook.remove()
    return torch.cat(seen).double().numpy()


def test_statistics_are_those_of_pytorch(checkpoints: Callable[[str], Path], fp32_bundle: Path) -> None:
    windows = _windows()
    workpiece = _workpiece(fp32_bundle, windows)
    linear = next(one for one in workpiece.linears if one.name.endswith("layers.1.mlp.down_proj"))
    ((name, statistics),) = workpiece.measure([linear.input], gram=True)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied"), attn_implementation="eager").eval()
    rows = _inputs_in_pytorch(reference, linear.name, windows)
    assert name == linear.input
    assert statistics.num_tokens == 96
    np.testing.assert_allclose(statistics.abs_max, np.abs(rows).max(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(statistics.gram, rows.T @ rows / 96, rtol=1e-2, atol=1e-3)


def test_sequential_statistics_are_those_of_the_rounded_model(
    checkpoints: Callable[[str], Path], fp32_bundle: Path
) -> None:
    """Every layer before the one asked about has its rounded weight, in ours and in PyTorch."""
    windows = _windows()
    workpiece = _workpiece(fp32_bundle, windows)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied"), attn_implementation="eager").eval()
    last = "model.layers.1.mlp.down_proj"
    exact = _inputs_in_pytorch(reference, last, windows)
    statistics_of = InputStatistics(workpiece, sequential=True)
    for linear in workpiece.linears:
        statistics = statistics_of(linear)
        rounded = rtn.quantize_weight(linear.read(workpiece.model), Grid(4, 32), rtn.Options())
        statistics_of.quantized(linear, rounded)
        if linear.name == last:
            break
        values = torch.from_numpy(rounded.dequantize())
        with torch.no_grad():
            if linear.role == "qkv_proj":
                attention = reference.get_submodule(linear.name.rpartition(".")[0])
                for part, rows in zip("qkv", values.split([64, 32, 32]), strict=True):
                    attention.get_submodule(f"{part}_proj").weight.copy_(rows)
            else:
                reference.get_submodule(linear.name).weight.copy_(values)
    rows = _inputs_in_pytorch(reference, last, windows)
    np.testing.assert_allclose(statistics.gram, rows.T @ rows / 96, rtol=1e-2, atol=1e-3)
    assert np.abs(rows.T @ rows - exact.T @ exact).max() / 96 > 0.01


def test_statistics_can_be_asked_for_again(fp32_bundle: Path) -> None:
    workpiece = _workpiece(fp32_bundle, _windows(1))
    statistics_of = InputStatistics(workpiece, sequential=True)
    first, *_, last = workpiece.linears
    one = statistics_of(first)
    exact = statistics_of(last).gram
    np.testing.assert_array_equal(statistics_of(first).gram, one.gram)  # anew
    statistics_of.quantized(first, rtn.quantize_weight(workpiece.read(first), Grid(2, 32), rtn.Options()))
    assert np.abs(statistics_of(last).gram - exact).max() > 0
    statistics_of(first)  # what was quantized is forgotten
    np.testing.assert_array_equal(statistics_of(last).gram, exact)


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3", "llama-biases"])
def test_rotation_leaves_the_function_as_it_is(
    architecture: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """To the rounding of float32, with a tied head and an untied one, packed attention and split, and biases."""
    export(str(checkpoints(architecture)), tmp_path / "fp32")
    windows = _windows(1)
    (expected,) = _workpiece(tmp_path / "fp32", windows).replay().until("logits")
    workpiece = _workpiece(tmp_path / "fp32", windows)
    before = {linear.name: workpiece.read(linear) for linear in workpiece.linears}
    rotate.transform(workpiece, rotate.Options())
    (actual,) = workpiece.replay().until("logits")
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())
    for linear in workpiece.linears:
        assert linear.role == "rotation" or np.abs(workpiece.read(linear) - before[linear.name]).max() > 0.01


@pytest.mark.parametrize("size", [64, 96, 576, 45])
def test_random_rotations_are_orthogonal_and_spread(size: int) -> None:
    rotation = random_rotation(size, seed=1)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(size), atol=1e-5)
    assert np.abs(rotation).max() < 0.75


def test_what_cannot_be_rotated_is_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path / "checkpoint")
    bundle = export(str(tmp_path / "checkpoint"), tmp_path / "fp32")
    with pytest.raises(UnsupportedError, match="can't be rotated"):
        quantize(bundle.path, tmp_path / "out", QuantizeOptions("int8", "rotate"))
    assert not (tmp_path / "out").exists()


def test_awq_never_makes_a_layer_worse(fp32_bundle: Path) -> None:
    """On the calibration text, by the outputs of the layers it scales, rounded the way it tries them."""
    workpiece = _workpiece(fp32_bundle, _windows(4, 64))
    sites = workpiece.fold_sites()
    grams = {name: one.gram for name, one in workpiece.measure([site.activations for site in sites], gram=True)}
    before = {linear.weight: workpiece.read(linear) for linear in workpiece.linears}
    awq.transform(workpiece, awq.Options())
    better = 0
    for site in sites:
        errors = []
        for scaled in (False, True):
            total = 0.0
            for linear in site.linears:
                weight = before[linear.weight]
                factors = np.ones(linear.shape[1], np.float32)
                if scaled:  # rows may be scaled too, by the site of the layer's output
                    ratio = workpiece.read(linear) / weight
                    factors = np.median(ratio / np.median(ratio, axis=1, keepdims=True), axis=0)
                plain = rtn.quantize_weight(weight * factors, Grid(4, 32, False), rtn.Options(search_steps=1))
                difference = weight - plain.dequantize() / factors
                total += float(np.einsum("nk,kl,nl->", difference, grams[site.activations], difference))
            errors.append(total)
        better += errors[1] < errors[0]
        assert errors[1] < errors[0] * 1.05  # the fit of the scales after rounding is not part of the search
    assert better > len(sites) / 2


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

    def random_factors(workpiece, options) -> None:
        rng = np.random.default_rng(0)
        for site in workpiece.fold_sites():
            factors = np.exp(0.3 * rng.standard_normal(site.linears[0].shape[1])).astype(np.float32)
            divide(workpiece.edits, site, factors)

    monkeypatch.setattr(smoothquant, "transform", random_factors)
    options = QuantizeOptions("int8", "smoothquant", calibration=Calibration(text, 2, 32))
    bundle = quantize(fp32_bundle, tmp_path / "out", options)
    ids = np.random.default_rng(0).integers(3, 259, 48)
    expected = Engine(ModelBundle.open(fp32_bundle)).score(ids)
    assert np.corrcoef(expected.ravel(), Engine(bundle).score(ids).ravel())[0, 1] > 0.995


def _normed(scale: np.ndarray, axis: int) -> Workpiece:
    """Return a norm of opset 23 before a linear layer."""
    weight = np.random.default_rng(1).standard_normal((8, 6)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("RMSNormalization", ["x", "scale"], ["normed"], axis=axis, epsilon=1e-6),
            helper.make_node("MatMul", ["normed", "weight"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["y"]),
        ],
        "normed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 6])],
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(weight, "weight")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    model = OnnxModel(proto, Path("normed.onnx"))
    sample = {"x": np.random.default_rng(2).standard_normal((4, 8)).astype(np.float32)}
    return Workpiece(model, choose_layers(model, Plan.make("int8", "rtn", {}), "", ""), [sample])


def test_norms_of_opset_23_can_be_rescaled(capsys: pytest.CaptureFixture[str]) -> None:
    scale = np.random.default_rng(3).uniform(0.5, 2, 8).astype(np.float32)
    workpiece = _normed(scale, axis=-1)
    (site,) = workpiece.fold_sites()
    (normed,), (hidden,) = (list(workpiece.replay().until(name)) for name in ("normed", "hidden"))
    factors = np.linspace(0.5, 2, 8, dtype=np.float32)
    divide(workpiece.edits, site, factors)
    (rescaled,), (same,) = (list(workpiece.replay().until(name)) for name in ("normed", "hidden"))
    np.testing.assert_allclose(rescaled * factors, normed, rtol=1e-5)
    np.testing.assert_allclose(same, hidden, rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().err == ""
    assert _normed(np.ones((4, 8), np.float32), axis=-2).fold_sites() == [], "its scale is not one per channel"
    assert "no norm that feeds linear layers alone was found" in capsys.readouterr().err


def test_smoothquant_uses_its_formula(fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workpiece = _workpiece(fp32_bundle, [])
    site = workpiece.fold_sites()[1]
    before = [workpiece.read(linear) for linear in site.linears]
    abs_max = np.linspace(0, 4, site.linears[0].shape[1], dtype=np.float32)
    monkeypatch.setattr(workpiece, "fold_sites", lambda: [site])
    monkeypatch.setattr(workpiece, "measure", lambda names: [(names[0], Statistics(1, abs_max))])
    vector = workpiece.edits.read_stored(site.vectors[0])
    smoothquant.transform(workpiece, smoothquant.Options(alpha=0.6))
    weights = np.max([np.abs(weight).max(0) for weight in before], axis=0).astype(np.float64)
    expected = abs_max.astype(np.float64) ** 0.6 / weights**0.4
    expected[0] = 1  # a channel that was never used says nothing
    np.testing.assert_allclose(workpiece.read(site.linears[0]), before[0] * expected, rtol=1e-5)
    np.testing.assert_allclose(workpiece.edits.read_stored(site.vectors[0]), vector / expected, rtol=1e-5)


@pytest.mark.parametrize(
    "grid", [Grid(4, 32, False), Grid(4, 32, True), Grid(4, 128, False), Grid(8), Grid(2, 32, False)]
)
@pytest.mark.parametrize("features", [128, 80])
def test_gptq_keeps_outputs_better_than_rounding_to_nearest(grid: Grid, features: int) -> None:
    weight = np.random.default_rng(1).standard_normal((48, features)).astype(np.float32)
    statistics = _statistics(features)
    plain = rtn.quantize_weight(weight, grid, rtn.Options())
    better = gptq.quantize_weight(weight, grid, gptq.Options(), statistics, "layer")
    again = gptq.quantize_weight(weight, grid, gptq.Options(), statistics, "layer")
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
    ours = gptq.quantize_weight(weight, grid, options, statistics, "layer")
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
    rounded = gptq.quantize_weight(weight, Grid(4, 32, False), gptq.Options(), empty, "layer.7")
    assert "`layer.7`: its inputs have singular statistics" in capsys.readouterr().err
    np.testing.assert_array_equal(rounded.codes, rtn.quantize_weight(weight, Grid(4, 32, False), rtn.Options()).codes)
    single = np.zeros((64, 64), np.float32)
    single[3, 3] = 1
    rounded = gptq.quantize_weight(
        weight, Grid(4, 32, False), gptq.Options(), Statistics(4, single[3], single), "layer"
    )
    assert np.isfinite(rounded.dequantize()).all()


def _hqq_by_the_book(weight: np.ndarray, grid: Grid, options: hqq.Options) -> np.ndarray:
    """Block by block in float64, the formulas of the paper one after the other."""
    restored = np.empty(weight.shape)
    for row, values in enumerate(weight.astype(np.float64)):
        for start in range(0, len(values), grid.block_size):
            block = values[start : start + grid.block_size]
            low, high = min(block.min(), 0), max(block.max(), 0)
            if grid.symmetric:
                scale, zero = max(-low, high) / (grid.middle - 1), grid.middle
            else:
                scale = (high - low) / grid.largest
                zero = round(-low / scale)
            unit, beta, best = scale, options.beta, np.inf
            for _ in range(options.iterations):
                scale = float(np.float16(scale))
                codes = np.clip(np.rint(block / scale) + zero, 0, grid.largest)
                error = (block - (codes - zero) * scale) / unit
                size = np.maximum(np.abs(error), 1e-6)
                norm = (size**options.lp_norm).sum()
                if norm < best:
                    best, restored[row, start : start + grid.block_size] = norm, (codes - zero) * scale
                shrunk = np.sign(error) * np.maximum(size - size ** (options.lp_norm - 1) / beta, 0)
                target = block - shrunk * unit
                if not grid.symmetric:
                    zero = int(np.clip(np.rint((codes - target / scale).mean()), 0, grid.largest))
                steps = codes - zero
                if steps @ target > 0:
                    scale = steps @ target / (steps @ steps)
                beta *= options.kappa
    return restored


@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(4, 32, True), Grid(2, 16, False), Grid(8, 32)])
def test_hqq_is_its_definition(grid: Grid) -> None:
    rng = np.random.default_rng(2)
    weight = (rng.standard_t(3, (24, 96)) * 0.02).astype(np.float32)
    for options in (hqq.Options(), hqq.Options(lp_norm=1.0, beta=3.0, kappa=1.2, iterations=7)):
        ours = hqq.quantize_weight(weight, grid, options).dequantize()
        expected = _hqq_by_the_book(weight, grid, options)
        # Float32 may round a value that lies on the edge between two codes the other way, and go on from there.
        same = np.isclose(ours, expected, atol=1e-6).reshape(-1, grid.block_size).all(1)
        assert same.mean() > 0.85


@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(4, 128, False), Grid(2, 32, True)])
def test_hqq_leaves_smaller_norms_than_its_start_and_forgives_outliers(grid: Grid) -> None:
    """The p-norm falls below that of rounding over the whole range, also where that has the best scales."""
    weight = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    weight[:, 5] *= 6
    for p in (0.5, 0.7, 1.0):
        ours = hqq.quantize_weight(weight, grid, hqq.Options(lp_norm=p))
        plain = rtn.quantize_weight(weight, grid, rtn.Options(search_steps=1))
        norms = [float((np.abs(one.dequantize() - weight).astype(np.float64) ** p).sum()) for one in (ours, plain)]
        assert norms[0] < norms[1] * 0.98
    assert ours.codes.max() <= grid.largest
    assert (ours.zero_points is None) == grid.symmetric


def test_blocks_that_have_no_range_are_rounded_exactly() -> None:
    """Zeros, one value, and rows that end within a block, by every method that needs no text."""
    weight = np.zeros((6, 80), np.float32)
    weight[1] = 0.25
    weight[2] = -3.0
    weight[3, 7] = 1.5
    weight[4] = np.linspace(-1, 1, 80)
    plugins = [registry.load("quantize.rounding", name) for name in ROUNDINGS]
    for plugin in (one for one in plugins if not one.NEEDS_STATISTICS):
        for grid in (Grid(4, 32, False), Grid(4, 32, True), Grid(8)):
            rounded = plugin.quantize_weight(weight, grid, plugin.Options())
            np.testing.assert_allclose(rounded.dequantize()[:4], weight[:4], rtol=2e-3, atol=0)
            assert np.isfinite(rounded.scales).all()
            assert (rounded.scales > 0).all()


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        *((scheme, method) for scheme in CODED for method in (*TRANSFORMS, *ROUNDINGS)),
        ("fp16", "rtn"),
        ("bf16", "rtn"),
        *(("int4", f"{transform},gptq") for transform in TRANSFORMS),
        ("int8", "rotate,smoothquant,gptq"),
    ],
)
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
    plan = Plan.make(scheme, method, {})
    assert bool(step.calibration) == bool(plan.needs_calibration)
    if plan.needs_calibration:
        assert step.calibration["num_samples"] == 4
    ids = np.array(Tokenizer.load(fp32_bundle).encode(text.read_text()))[300:348]
    expected, actual = Engine(ModelBundle.open(fp32_bundle)).score(ids), Engine(bundle).score(ids)
    assert np.corrcoef(expected.ravel(), actual.ravel())[0, 1] > {"int2": 0.3, "int4": 0.85}.get(scheme, 0.995)


def test_sequential_gptq_sees_other_inputs(fp32_bundle: Path, tmp_path: Path, text: Path) -> None:
    """The first layer is rounded alike, for its inputs are the float model's; the last one is not."""
    codes = []
    for value in ("false", "true"):
        options = QuantizeOptions("int4", "gptq", {"sequential": value}, calibration=Calibration(text, 4, 64))
        model = OnnxModel.load(quantize(fp32_bundle, tmp_path / value, options).model)
        codes.append({name: model.read(one) for name, one in model.initializers.items() if name.endswith("_q4")})
    first, last = "model.layers.0.self_attn.qkv_proj.weight_q4", "model.layers.1.mlp.down_proj.weight_q4"
    np.testing.assert_array_equal(codes[0][first], codes[1][first])
    assert (codes[0][last] != codes[1][last]).mean() > 0.01


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
        ("awq", {"steps": "0"}, "steps 0"),
        ("hqq", {"lp_norm": "0"}, r"lp_norm 0\.0"),
        ("hqq", {"beta": "inf"}, "beta inf"),
        ("hqq", {"kappa": "0.5"}, r"kappa 0\.5"),
        ("hqq", {"iterations": "0"}, "iterations 0"),
        ("hqq", {"search_steps": "3"}, "no option `search_steps`"),
        ("gptq,hqq", {}, "not transforms first"),
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


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [*((method, {}) for method in (*TRANSFORMS, "gptq", "smoothquant,gptq")), ("rtn", {"search_steps": "3"})],
)
def test_methods_that_floats_have_no_use_for_are_refused(
    scheme: str, method: str, settings: dict, fp32_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=f"has nothing to do: {scheme} rounds each value by itself"):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme, method, settings))
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_said(fp32_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match="tokens"):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", "gptq", calibration=Calibration(text)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]
