"""Zeros in the weights of ONNX graphs: exactly as many as asked for, where each method says; the rest unchanged."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmfast import registry
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, OptionError, UnsupportedError
from llmfast.graph.linear import find_linears
from llmfast.graph.model import OnnxModel
from llmfast.infer.engine import Engine
from llmfast.prune.graph.allocate import SPREAD, Losses, allocate
from llmfast.prune.graph.inputs import Inputs, Share
from llmfast.prune.options import Pattern, PruneOptions
from llmfast.prune.stage import plan, prune
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.verdict import Gate

MASKS = registry.names("prune.masks")
CALIBRATION = Calibration(num_samples=4, seq_len=48)
ROLES = {"qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _options(method: str, **choices: Any) -> PruneOptions:
    return PruneOptions(method, **({"calibration": CALIBRATION, "data_samples": 2} | choices))


def _inputs(features: int, tokens: int = 600) -> tuple[np.ndarray, Inputs]:
    """Return activations whose channels are correlated and differ in size, as real ones do."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((tokens, features)) @ rng.standard_normal((features, features)) / np.sqrt(features)
    rows = (rows * np.exp(rng.standard_normal(features))).astype(np.float32)
    return rows, Inputs.of([rows[None]], gram=True)


def _weight(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)


def _prune(method: str, weight: np.ndarray, share: Share, inputs: Inputs) -> np.ndarray:
    plugin = registry.load("prune.masks", method)
    pruned: np.ndarray = plugin.prune_weight(weight, share, plugin.Options(), inputs, "layer")
    return pruned


def _matrices(folder: Path) -> dict[str, np.ndarray]:
    """Return the linear layers of a bundle, [N, K] each."""
    model = OnnxModel.load(folder / "model.onnx")
    return {one.name: one.read(model) for one in find_linears(model)}


@pytest.mark.parametrize("name", MASKS)
def test_every_method_keeps_the_contract(name: str) -> None:
    plugin = registry.load("prune.masks", name)
    assert registry.make_options(plugin, {}) == plugin.Options()
    assert isinstance(plugin.NEEDS_INPUTS, bool)
    assert plugin.NEEDS_INPUTS >= plugin.NEEDS_GRAM


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("method", MASKS)
def test_as_many_zeros_as_asked_for(method: str, ratio: float) -> None:
    weight = _weight(37, 300)
    pruned = _prune(method, weight, Share(ratio), _inputs(300)[1])
    assert pruned.dtype == np.float32
    assert pruned.shape == weight.shape
    assert (pruned == 0).sum() == round(ratio * weight.size)
    if ratio == 0:
        np.testing.assert_array_equal(pruned, weight)
    if method != "sparsegpt":
        np.testing.assert_array_equal(pruned[pruned != 0], weight[pruned != 0])


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("method", MASKS)
def test_a_pattern_holds_in_every_group(method: str, pattern: str) -> None:
    asked = Pattern.parse(pattern)
    pruned = _prune(method, _weight(16, 258), Share(0.0, asked), _inputs(258)[1])
    whole = 258 // asked.group * asked.group
    groups = (pruned[:, :whole] != 0).reshape(16, -1, asked.group).sum(2)
    assert (groups == asked.keep).all()
    assert (pruned[:, whole:] != 0).all()


@pytest.mark.parametrize("share", [Share(0.5), Share(0.0, Pattern(2, 4))])
def test_each_method_loses_less_than_the_one_before(share: Share) -> None:
    rows, inputs = _inputs(256)
    weight = _weight(48, 256)
    lost = {
        name: float(np.square(rows @ (weight - _prune(name, weight, share, inputs)).T).mean())
        for name in ("magnitude", "wanda", "sparsegpt")
    }
    assert lost["sparsegpt"] < 0.8 * lost["wanda"] < 0.8 * lost["magnitude"]


def test_sparsegpt_makes_up_as_well_as_one_column_can() -> None:
    """One column of two goes: the other gets what least squares gives it."""
    rows, inputs = _inputs(2)
    weight = np.array([[0.01, 1.0]], np.float32)
    pruned = _prune("sparsegpt", weight, Share(0.5), inputs)
    assert pruned[0, 0] == 0
    exact = np.linalg.lstsq(rows[:, 1:], rows @ weight.T, rcond=None)[0]
    assert pruned[0, 1] == pytest.approx(exact[0, 0], rel=0.02)


def test_singular_inputs_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = Inputs(np.full(8, np.nan, np.float32), np.full((8, 8), np.nan, np.float32))
    pruned = _prune("sparsegpt", _weight(4, 8), Share(0.5), inputs)
    assert (pruned == 0).sum() == 16
    assert "singular" in capsys.readouterr().err


def test_wanda_weighs_by_the_norms_that_pytorch_sees(
    checkpoints: Callable[[str], Path], fp32_bundle: Path, tmp_path: Path
) -> None:
    prune(str(fp32_bundle), tmp_path / "wanda", _options("wanda", ratios={"": 0.5}))
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied")).eval()
    seen: list[np.ndarray] = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][0].double().numpy())
    )
    with torch.no_grad():
        for sample in CALIBRATION.split(ModelBundle.open(fp32_bundle))[0]:
            model(torch.from_numpy(sample[None]))
    hook.remove()
    norms = np.linalg.norm(np.concatenate(seen), axis=0)
    before, after = _matrices(fp32_bundle), _matrices(tmp_path / "wanda")
    (name,) = [one for one in before if one.endswith("layers.0.self_attn.qkv_proj")]
    scores = np.abs(before[name]) * norms
    kept = scores >= np.median(scores, axis=1, keepdims=True)
    assert ((after[name] != 0) == kept).mean() > 0.999


def test_a_pruned_bundle_is_the_pytorch_model_with_those_weights_zero(
    checkpoints: Callable[[str], Path], fp32_bundle: Path, tmp_path: Path
) -> None:
    measured = prune(str(fp32_bundle), tmp_path / "half", _options("magnitude", ratios={"": 0.5})).document()
    matrices = _matrices(tmp_path / "half")
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied"), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in matrices.items():
            if name.endswith("qkv_proj"):
                attention = model.get_submodule(name.rpartition(".")[0])
                for part, rows in zip("qkv", np.split(weight, [64, 96]), strict=True):
                    attention.get_submodule(f"{part}_proj").weight.copy_(torch.from_numpy(rows.copy()))
            elif "layers." in name:
                model.get_submodule(name).weight.copy_(torch.from_numpy(weight.copy()))
    ids = np.random.default_rng(0).integers(3, 259, 40)
    bundle = ModelBundle.open(tmp_path / "half")
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids[None])).logits[0].numpy()
    np.testing.assert_allclose(Engine(bundle, threads=1).score(ids), theirs, rtol=1e-3, atol=1e-3)
    zeros = sum(int((weight == 0).sum()) for name, weight in matrices.items() if "layers." in name)
    assert bundle.manifest.sparsity == pytest.approx(zeros / bundle.manifest.architecture["num_parameters"])
    assert {row["role"]: row["sparsity"] for row in measured["layers"]} == dict.fromkeys(ROLES, 0.5)
    step = bundle.manifest.lineage[-1]
    assert (step.stage, step.method, step.options["ratio"]) == ("prune", "magnitude", 0.5)
    assert step.calibration is None
    assert bundle.manifest.measured["export"]["parity"]


def test_size_and_zipped_size_are_those_of_the_files(fp32_bundle: Path, tmp_path: Path) -> None:
    measured = prune(
        str(fp32_bundle), tmp_path / "most", _options("magnitude", ratios={"": 0.9}, measure=False)
    ).document()
    for folder, row in zip((fp32_bundle, tmp_path / "most"), measured["rows"], strict=True):
        data = (folder / "model.onnx").read_bytes()
        assert row["size_bytes"] == len(data)
        assert row["zipped_bytes"] == pytest.approx(len(zlib.compress(data, 1)), rel=0.01)
    before, after = measured["rows"]
    assert after["size_bytes"] == pytest.approx(before["size_bytes"], rel=0.01)
    assert after["zipped_bytes"] < 0.7 * before["zipped_bytes"]


def test_the_same_options_give_the_same_bytes(fp32_bundle: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prune(str(fp32_bundle), tmp_path / name / "out", _options("sparsegpt", pattern=Pattern(2, 4)))
    for file in (tmp_path / "one" / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / "out" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_shares_by_sensitivity_keep_the_average(method: str, fp32_bundle: Path, tmp_path: Path) -> None:
    options = _options(method, ratios={"": 0.6}, allocation="sensitivity", measure=False)
    measured = prune(str(fp32_bundle), tmp_path / "out", options).document()
    layers = measured["layers"]
    zeros, parameters = (sum(row[key] for row in layers) for key in ("zeros", "num_parameters"))
    assert zeros / parameters == pytest.approx(0.6, abs=0.01)
    assert len({row["sparsity"] for row in layers}) > 1
    assert all(abs(row["sparsity"] - 0.6) <= SPREAD + 0.01 for row in layers)


def test_the_layer_with_less_to_lose_gets_more_zeros() -> None:
    rng = np.random.default_rng(0)
    even = rng.standard_normal((64, 64)).astype(np.float32)
    uneven = (even * np.exp(2 * rng.standard_normal((64, 64)))).astype(np.float32)
    power = np.ones(64, np.float32)
    shares = allocate({"even": Losses.of(even, power), "uneven": Losses.of(uneven, power)}, 0.5)
    assert shares["even"] < 0.5 < shares["uneven"]
    assert np.mean(list(shares.values())) == pytest.approx(0.5, abs=0.005)


def test_a_lone_graph_and_chosen_layers(fp32_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((fp32_bundle / "model.onnx").read_bytes())
    options = _options("magnitude", ratios={"": 0.5}, include="mlp", exclude="down_proj")
    assert [row["role"] for row in plan(str(path), tmp_path / "out", options)] == ["gate_proj", "up_proj"]
    prune(str(path), tmp_path / "out", options)
    before, after = _matrices(fp32_bundle), _matrices(tmp_path / "out")
    changed = {name for name, weight in after.items() if not np.array_equal(weight, before[name])}
    assert changed == {name for name in before if name.endswith(("gate_proj", "up_proj"))}


def test_weights_behind_a_transpose_and_shared_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        node("MatMul", ["x", "turned"], ["h"]),
        node("MatMul", ["h", "turned"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", 8])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    measured = prune(str(tmp_path / "m.onnx"), tmp_path / "out", _options("magnitude", ratios={"": 0.5})).document()
    model = OnnxModel.load(tmp_path / "out" / "model.onnx")
    pruned = model.read(model.initializers["w"])
    assert (pruned == 0).sum() == 32
    np.testing.assert_array_equal(pruned[pruned != 0], weight[pruned != 0])
    assert measured["layers"][0]["layers"] == 1
    assert measured["rows"][1]["relative_error"] > 0


def test_the_command_says_what_zeros_are_good_for(fp32_bundle: Path, tmp_path: Path) -> None:
    arguments = ["prune", fp32_bundle, "-o", tmp_path / "out", "--method", "wanda", "--pattern", "2:4"]
    arguments += ["--num-samples", "4", "--seq-len", "48"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "no speed-up on ONNX Runtime; smaller only when compressed" in result.stderr
    assert "zipped MB" in result.stdout
    result = CliRunner().invoke(app, [*map(str, arguments), "--overwrite", "--format", "json"])
    document = json.loads(result.stdout)
    assert document["rows"][1]["sparsity"] == ModelBundle.open(tmp_path / "out").manifest.sparsity


def test_what_masks_can_not_do(fp32_bundle: Path, tmp_path: Path) -> None:
    source, output = str(fp32_bundle), tmp_path / "out"
    with pytest.raises(GateError, match="kld"):
        prune(source, output, _options("magnitude", ratios={"": 0.9}, gates=(Gate("kld", 1e-6, "max"),)))
    with pytest.raises(OptionError, match="no speed to gain"):
        prune(source, output, _options("magnitude", target_params=0.5))
    with pytest.raises(OptionError, match="one method"):
        prune(source, output, _options("magnitude,wanda", ratios={"": 0.5}))
    with pytest.raises(OptionError, match="as many zeros in every layer"):
        prune(source, output, _options("wanda", pattern=Pattern(2, 4), allocation="sensitivity"))
    with pytest.raises(OptionError, match="not N:M"):
        Pattern.parse("4:2")
    with pytest.raises(OptionError, match="not a regular expression"):
        prune(source, output, _options("magnitude", ratios={"": 0.5}, include="("))
    with pytest.raises(UnsupportedError, match="nothing to prune"):
        prune(source, output, _options("magnitude", ratios={"": 0.5}, include="nothing"))
    quantize(fp32_bundle, tmp_path / "int4", QuantizeOptions("int4", measure=False))
    with pytest.raises(UnsupportedError, match="already quantized"):
        prune(str(tmp_path / "int4"), output, _options("magnitude", ratios={"": 0.5}))
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]
