"""Mixed precision: the knapsack, what layers cost, and budgets of size and of divergence."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, InputError, OptionError
from llmfast.export.stage import export
from llmfast.graph.model import OnnxModel, count_weight_bytes
from llmfast.graph.packed import Grid
from llmfast.infer.engine import Engine
from llmfast.quantize.allocate import Option, allocate, lower_hull
from llmfast.quantize.budget import Budget, block_bytes
from llmfast.quantize.fitting import Fitting
from llmfast.quantize.plan import Part, Plan, choose_layers
from llmfast.quantize.rounding import rtn
from llmfast.quantize.sensitivity import FILE, PROBE, WeightProbe, grid_errors, targets_of
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.verdict import Gate
from tests.tiny_encoder import save_encoder


def _layers(seed: int, count: int = 6) -> list[list[Option]]:
    rng = np.random.default_rng(seed)
    return [
        [Option(bits, int(bits * weight), cost / 4.0**bits) for bits in (2, 4, 8)]
        for weight, cost in zip(rng.integers(50, 200, count), rng.exponential(1, count), strict=True)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_nearly_the_best_of_all(seed: int) -> None:
    layers = _layers(seed)
    sizes = sorted(sum(one.num_bytes for one in choice) for choice in itertools.product(*layers))
    limit = sizes[len(sizes) // 2]
    chosen = allocate(layers, limit)
    assert sum(one.num_bytes for one in chosen) <= limit
    damage = sum(one.damage for one in chosen)
    fitting = [choice for choice in itertools.product(*layers) if sum(one.num_bytes for one in choice) <= limit]
    best = min(sum(one.damage for one in choice) for choice in fitting)
    # Off by less than one step of one layer.
    assert best <= damage <= best + max(options[0].damage for options in layers)
    # The other way round, the smallest under a cap of damage is at most one step larger than the best.
    small = allocate(layers, max_damage=damage)
    assert sum(one.damage for one in small) <= damage
    enough = [choice for choice in itertools.product(*layers) if sum(one.damage for one in choice) <= damage]
    least = min(sum(one.num_bytes for one in choice) for choice in enough)
    largest_step = max(options[-1].num_bytes for options in layers)
    assert least <= sum(one.num_bytes for one in small) <= least + largest_step


def test_what_does_not_fit_is_none_and_useless_options_are_dropped() -> None:
    assert allocate(_layers(0), max_bytes=10) is None
    options = [Option("a", 10, 1.0), Option("worse", 12, 2.0), Option("above", 14, 0.9), Option("b", 20, 0.1)]
    assert [one.choice for one in lower_hull(options)] == ["a", "b"]


def test_damage_is_that_of_a_graph_with_the_rounded_weight(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = ModelBundle.open(fp32_bundle)
    model = OnnxModel.load(bundle.model)
    plan = Plan.make("int4", "rtn", {})
    layers = choose_layers(model, plan, "", "")
    linear = next(one for one in layers.linears if one.name.endswith("layers.0.mlp.down_proj"))
    ids = np.random.default_rng(0).integers(3, 259, (1, 48))
    feeds = {
        "input_ids": ids,
        "seqlens_k": np.array([47], np.int32),
        "total_sequence_length": np.array(48, np.int32),
        "num_logits": np.array([48]),
    }
    feeds |= {
        value.name: np.zeros((1, 2, 0, 16), np.float32)
        for value in model.proto.graph.input
        if value.name.startswith("past")
    }
    rounded = rtn.quantize_weight(np.ascontiguousarray(linear.read(model)), PROBE, rtn.Options()).dequantize()
    probe = WeightProbe({"model": Part(plan, model, layers)}, {"model": [feeds]})
    values = np.ascontiguousarray(rounded if linear.stored_transposed else rounded.T)
    damage = probe.damage(linear.weight, values)

    import onnx

    changed = onnx.load(bundle.model)
    (tensor,) = [one for one in changed.graph.initializer if one.name == linear.weight]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, linear.weight))
    folder = tmp_path / "changed"
    folder.mkdir()
    onnx.save(changed, folder / "model.onnx")
    (folder / "config.json").write_bytes((fp32_bundle / "config.json").read_bytes())
    p, q = (np.exp(Engine(one).score(ids[0]).astype(np.float64)) for one in (bundle, ModelBundle.open(folder)))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert damage == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-2)
    unchanged = model.read(model.initializers[linear.weight])
    assert probe.damage(linear.weight, np.ascontiguousarray(unchanged)) == pytest.approx(0, abs=1e-6)


def test_errors_of_grids_are_relative_to_the_probe() -> None:
    matrix = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    errors = grid_errors(matrix, [PROBE, Grid(8, 64), Grid(4, 128)])
    assert errors[PROBE] == 1
    assert errors[Grid(8, 64)] < 0.02 < 1 < errors[Grid(4, 128)]
    assert grid_errors(np.zeros((4, 64), np.float32), [PROBE])[PROBE] <= 1


def test_size_budgets_are_kept_and_used(fp32_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    klds = []
    for bits in (6.0, 8.0):
        options = QuantizeOptions("int4", budget=Budget(max_bits=bits), overwrite=True)
        bundle = quantize(fp32_bundle, tmp_path / "out", options)
        assert 0.8 * bits < bundle.manifest.bits_per_weight <= bits
        klds.append(bundle.manifest.measured["quantize"]["kld"])
    assert klds[1] < klds[0]
    assert {row["bits"] for row in bundle.manifest.measured["quantize"]["layers"]} == {4, 8}
    assert "what layers cost" in capsys.readouterr().err
    ranking = json.loads((bundle.path / FILE).read_text())["layers"]
    damages = [row["damage"] for row in ranking]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > 0
    assert bundle.manifest.lineage[-1].options["budget"]["max_bits"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # The same ranking, read back, gives the same weights.
    again = QuantizeOptions("int4", budget=Budget(max_bits=8.0), sensitivity=bundle.path)
    repeated = quantize(fp32_bundle, tmp_path / "again", again)
    assert repeated.model.read_bytes() == bundle.model.read_bytes()


def test_a_choice_by_layer_is_not_worse_than_one_grid(
    fp32_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uniform = quantize(fp32_bundle, tmp_path / "uniform", QuantizeOptions("int4"))
    model = OnnxModel.load(fp32_bundle / "model.onnx")
    plan = Plan.make("int4", "rtn", {})
    targets = targets_of({"model": Part(plan, model, choose_layers(model, plan, "", ""))})
    # As if the last layers were worth everything, and the table nothing.
    rows = [
        {"weight": weight, "name": one.name, "role": one.role, "shape": one.layer.shape}
        | {"damage": float(".layers.1.mlp" in weight)}
        for weight, one in targets.items()
    ]
    path = tmp_path / FILE
    path.write_text(json.dumps({"format": 1, "method": "gptq", "layers": rows}), encoding="utf-8")
    budget = Budget(max_bits=1.001 * uniform.manifest.bits_per_weight)
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", budget=budget, sensitivity=path))
    assert bundle.model.read_bytes() == uniform.model.read_bytes()
    said = capsys.readouterr().err
    assert f"`{path}` was measured with gptq" in said
    assert "the same blocks everywhere" in said


def test_sizes_of_grids_are_those_that_are_written(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", measure=False))
    written = OnnxModel.load(bundle.model)
    for linear in choose_layers(OnnxModel.load(fp32_bundle / "model.onnx"), Plan.make("int4", "", {}), "", "").linears:
        if linear.name.endswith("proj"):
            parts = [one for one in written.proto.graph.initializer if one.name.startswith(f"{linear.name}.weight")]
            stored = sum(len(one.raw_data) for one in parts)
            assert stored == block_bytes(linear.shape, Grid(4, 32, False))
    assert count_weight_bytes([written]) > 0


def test_divergence_budgets_give_the_smallest_that_keeps_them(fp32_bundle: Path, tmp_path: Path) -> None:
    sizes = []
    for limit in (0.004, 0.05):
        gates = (Gate("kld", limit, "max"),)
        options = QuantizeOptions("int4", budget=Budget(max_kld=limit), gates=gates, overwrite=True)
        bundle = quantize(fp32_bundle, tmp_path / "out", options)
        assert bundle.manifest.measured["quantize"]["kld"] <= limit
        sizes.append(bundle.manifest.bits_per_weight)
    assert sizes[1] < sizes[0]


def test_a_generous_divergence_is_met_at_once(
    fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, layers = [], Fitting.layers

    def watching(self: Fitting):
        written.append(layers(self))
        return written[-1]

    monkeypatch.setattr(Fitting, "layers", watching)
    quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", budget=Budget(max_kld=100.0)))
    assert len(written) == 1


def test_a_ranking_taken_over_keeps_its_origin(fp32_bundle: Path, tmp_path: Path) -> None:
    budget = Budget(max_bits=6.0)
    first = quantize(fp32_bundle, tmp_path / "first", QuantizeOptions("int4", budget=budget, measure=False))
    taken = QuantizeOptions("int4", method="gptq", budget=budget, sensitivity=first.path, measure=False)
    second = quantize(fp32_bundle, tmp_path / "second", taken)
    assert json.loads((second.path / FILE).read_text())["method"] == "rtn"
    assert (second.path / FILE).read_bytes() == (first.path / FILE).read_bytes()


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(max_bits=2.0), r"at least \d+\.\d+ bits per weight are needed, asked at most 2 bits per weight"),
        (Budget(max_bytes=1000.0), r"at least 0\.\d+ MB are needed, asked at most 0.001 MB"),
        (Budget(max_kld=1e-7), r"budget missed: kld \d.* is the best that can be, asked at most 1e-07"),
    ],
)
def test_budgets_that_cannot_be_met_say_what_can(
    budget: Budget, reason: str, fp32_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(GateError, match=reason):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", budget=budget))
    assert not (tmp_path / "out").exists()


def test_encoders_have_budgets_too(tmp_path: Path) -> None:
    save_encoder(tmp_path / "checkpoint")
    fp32 = export(str(tmp_path / "checkpoint"), tmp_path / "fp32")
    small = quantize(fp32.path, tmp_path / "out", QuantizeOptions("int4", budget=Budget(max_bits=14.0)))
    assert small.manifest.bits_per_weight <= 14
    assert small.manifest.measured["quantize"]["cosine"] > 0.98


@pytest.mark.parametrize("values", [{}, {"max_bits": 4.0, "max_bytes": 1.0}, {"max_bits": 0.0}, {"max_kld": -1.0}])
def test_impossible_budgets_are_refused(values: dict) -> None:
    with pytest.raises(OptionError):
        Budget(**values)


@pytest.mark.parametrize(("name", "value"), [("block_size", "128"), ("int4.block-size", "32"), ("head-bits", "4")])
def test_what_a_budget_chooses_is_not_set(name: str, value: str) -> None:
    budget = Budget(max_bits=6.0)
    with pytest.raises(OptionError, match=f"--set {name}={value} does not go with a budget"):
        QuantizeOptions("int4", settings={name: value}, budget=budget)
    QuantizeOptions("int4", settings={name: value})
    QuantizeOptions("int4", settings={"head_bits": "32", "symmetric": "true"}, budget=budget)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 9}', '{"format": 1, "layers": [{"weight": "w"}]}'])
def test_malformed_sensitivity_is_named(content: str, fp32_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(content, encoding="utf-8")
    options = QuantizeOptions("int4", budget=Budget(max_bits=6.0), sensitivity=path)
    with pytest.raises(InputError, match=r"sensitivity\.json"):
        quantize(fp32_bundle, tmp_path / "out", options)


def test_sensitivity_of_another_model_is_refused(fp32_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text('{"format": 1, "layers": []}', encoding="utf-8")
    options = QuantizeOptions("int4", budget=Budget(max_bits=6.0), sensitivity=path)
    with pytest.raises(InputError, match="is of another model"):
        quantize(fp32_bundle, tmp_path / "out", options)
    with pytest.raises(OptionError, match="--sensitivity needs a budget"):
        QuantizeOptions("int4", sensitivity=path)


def test_command_takes_budgets_in_place_of_a_scheme(fp32_bundle: Path, tmp_path: Path) -> None:
    def run(*arguments: str):
        return CliRunner().invoke(app, ["quantize", str(fp32_bundle), "-o", str(tmp_path / "out"), *arguments])

    result = run("--target-size", "0.12MB", "--format", "json", "--no-measure")
    assert result.exit_code == 0, result.output
    result = run("--max-kld", "0.05", "--format", "json", "--overwrite")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kld"] <= 0.05
    for arguments, word in [
        (("--target-size", "small"), "not a size"),
        (("--target-size", "1MB", "--target-bits", "4"), "exactly one"),
        (("--target-bits", "5", "--scheme", "int8"), "leave out --scheme"),
        ((), "--scheme, a budget or --auto"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert word in result.stderr
