"""Budgets of encoder-decoders: one choice for both graphs, by what the decoder says."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.graph.linear import find_embeddings
from llmfast.graph.model import OnnxModel
from llmfast.quantize import plan as planning
from llmfast.quantize import sensitivity
from llmfast.quantize.budget import Budget
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.corpus import Corpus
from llmfast.quantize.pairs import PairReader, feed_pairs
from llmfast.quantize.plan import Part, Plan, choose_layers
from llmfast.quantize.rounding import rtn
from llmfast.quantize.sensitivity import FILE, PROBE, WeightProbe, targets_of
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.tokenizer import Tokenizer
from tests.tiny_seq2seq import LETTERS, exports_in

# Layers of the graphs, and the parameters of PyTorch that hold their weights.
SAME = {
    "t5": {
        "encoder.layers.1.fc2": ["encoder.block.1.layer.1.DenseReluDense.wo.weight"],
        "decoder.layers.1.encoder_attn.kv_proj": [
            "decoder.block.1.layer.1.EncDecAttention.k.weight",
            "decoder.block.1.layer.1.EncDecAttention.v.weight",
        ],
        "decoder.layers.0.fc1": ["decoder.block.0.layer.2.DenseReluDense.wi.weight"],
        "shared": ["shared.weight"],
    },
    "bart": {
        "encoder.layers.0.fc1": ["model.encoder.layers.0.fc1.weight"],
        "decoder.layers.1.fc2": ["model.decoder.layers.1.fc2.weight"],
        "shared": ["model.shared.weight"],
    },
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    return exports_in(tmp_path_factory)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.txt"
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join("".join(rng.choice(list(LETTERS[:26]), 3)) for _ in range(rng.integers(2, 8)))

    path.write_text("".join(f"{text()}\t{text()}\n" for _ in range(20)), encoding="utf-8")
    return path


@pytest.fixture
def large_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the encoder's table be large enough to be quantized, as it is in models of use."""
    monkeypatch.setattr(planning, "find_embeddings", lambda model, linears: find_embeddings(model, linears, 3000))


def _options(pairs: Path, method: str = "rtn", **settings: Any) -> QuantizeOptions:
    return QuantizeOptions("int4", method, calibration=Calibration(pairs, 14), **{"data": pairs, **settings})


def _parts(bundle: Path) -> dict[str, Part]:
    plan = Plan.make("int4", "rtn", {})
    models = {role: OnnxModel.load(path) for role, path in ModelBundle.open(bundle).graphs.items()}
    return {role: Part(plan, model, choose_layers(model, plan, "", "")) for role, model in models.items()}


def _assert_same(one: ModelBundle, other: ModelBundle) -> None:
    names = sorted(file.name for file in one.path.iterdir())
    assert names == sorted(file.name for file in other.path.iterdir())
    for name in names:
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name


@pytest.mark.parametrize("name", SAME)
def test_damage_is_that_of_pytorch_with_the_rounded_weight(
    exported: Any, pairs: Path, name: str, large_tables: None
) -> None:
    bundle, model = exported(name)
    parts, opened = _parts(bundle), ModelBundle.open(bundle)
    models = {role: part.model for role, part in parts.items()}
    probe = WeightProbe(parts, feed_pairs(models, PairReader(opened).read(Corpus(pairs), 512)[:2]))
    targets = {one.name: (weight, one) for weight, one in targets_of(parts).items()}
    tokenizer = Tokenizer.load(bundle)

    def answers() -> list[torch.Tensor]:
        found = []
        for line in pairs.read_text(encoding="utf-8").splitlines()[:2]:
            source, target = line.split("\t")
            ids = [model.config.decoder_start_token_id, *tokenizer.encode(target, add_special_tokens=False)]
            given = {"input_ids": [tokenizer.encode(source)], "decoder_input_ids": [ids]}
            with torch.no_grad():
                logits = model(**{key: torch.tensor(value) for key, value in given.items()}).logits[0]
            found.append(logits.double().log_softmax(-1))
        return found

    theirs = answers()
    for layer, parameters in SAME[name].items():
        weight, target = targets[layer]
        matrix = np.ascontiguousarray(target.layer.read(models[target.graph]))
        rounded = rtn.quantize_weight(matrix, PROBE, rtn.Options()).dequantize()
        damage = probe.damage(weight, np.ascontiguousarray(target.layer.as_stored(rounded)))
        held = [model.get_parameter(parameter) for parameter in parameters]
        before = [one.detach().clone() for one in held]
        with torch.no_grad():
            for one, piece in zip(held, np.split(rounded, len(held)), strict=True):
                one.copy_(torch.from_numpy(piece))
        moved = [(p.exp() * (p - q)).sum(-1).mean().item() for p, q in zip(theirs, answers(), strict=True)]
        with torch.no_grad():
            for one, values in zip(held, before, strict=True):
                one.copy_(values)
        assert damage == pytest.approx(np.mean(moved), rel=2e-2), layer
        assert probe.damage(weight, np.ascontiguousarray(target.layer.as_stored(matrix))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("name", "bits"), [("t5", (7.5, 9.0)), ("bart", (12.0, 13.5))])
def test_size_budgets_are_kept_and_used(
    exported: Any, pairs: Path, tmp_path: Path, name: str, bits: tuple[float, float]
) -> None:
    bundle, _ = exported(name)
    klds = []
    for limit in bits:
        small = quantize(bundle, tmp_path / "out", _options(pairs, budget=Budget(max_bits=limit), overwrite=True))
        assert 0.85 * limit < small.manifest.bits_per_weight <= limit
        klds.append(small.manifest.measured["quantize"]["kld"])
    assert 0 < klds[1] < klds[0]
    assert {row["bits"] for row in small.manifest.measured["quantize"]["layers"]} == {4, 8}
    step = small.manifest.lineage[-1]
    assert step.options["budget"]["max_bits"] == bits[1]
    assert step.calibration["num_samples"] == 14
    ranking = json.loads((small.path / FILE).read_text())["layers"]
    assert {row["weight"] for row in ranking} == set(targets_of(_parts(bundle)))
    damages = [row["damage"] for row in ranking]
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] >= 0 < damages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # The same ranking, read back, gives the same files.
    again = _options(pairs, budget=Budget(max_bits=bits[1]), sensitivity=small.path)
    _assert_same(quantize(bundle, tmp_path / "again", again), small)


def test_what_both_graphs_read_gets_one_grid_and_is_stored_once(
    exported: Any, pairs: Path, tmp_path: Path, large_tables: None
) -> None:
    bundle, _ = exported("t5")
    parts = _parts(bundle)
    assert len([part for part in parts.values() if "shared.weight" in part.layers.grids]) == 2
    small = quantize(bundle, tmp_path / "out", _options(pairs, budget=Budget(max_bits=6.0)))
    assert small.manifest.bits_per_weight <= 6
    tables = [
        {tensor.name: [(entry.key, entry.value) for entry in tensor.external_data]}
        for path in small.graphs.values()
        for tensor in OnnxModel.load(path).proto.graph.initializer
        if re.fullmatch(r"shared\.weight_q\d", tensor.name)
    ]
    assert len(tables) == 2
    assert tables[0] == tables[1]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_choice_by_layer_is_not_worse_than_one_grid(
    exported: Any, pairs: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, _ = exported("t5")
    uniform = quantize(bundle, tmp_path / "uniform", _options(pairs, method))
    budget = Budget(max_bits=1.001 * uniform.manifest.bits_per_weight)
    by_layer = quantize(bundle, tmp_path / "by-layer", _options(pairs, method, budget=budget))
    assert by_layer.manifest.bits_per_weight <= budget.max_bits
    klds = [one.manifest.measured["quantize"]["kld"] for one in (by_layer, uniform)]
    assert klds[0] <= klds[1]
    # As if the encoder were worth everything, and the decoder nothing.
    known = json.loads((by_layer.path / FILE).read_text())
    for row in known["layers"]:
        row["damage"] = float(row["weight"].startswith("encoder"))
    path = tmp_path / FILE
    path.write_text(json.dumps(known), encoding="utf-8")
    misled = quantize(bundle, tmp_path / "misled", _options(pairs, method, budget=budget, sensitivity=path))
    assert misled.manifest.measured["quantize"]["kld"] <= klds[1]
    assert "the same blocks everywhere" in capsys.readouterr().err


def test_divergence_budgets_give_the_smallest_that_keeps_them(exported: Any, pairs: Path, tmp_path: Path) -> None:
    bundle, _ = exported("bart")
    uniform = quantize(bundle, tmp_path / "uniform", _options(pairs)).manifest.measured["quantize"]["kld"]
    sizes = []
    for limit in (uniform / 8, uniform):
        small = quantize(bundle, tmp_path / "out", _options(pairs, budget=Budget(max_kld=limit), overwrite=True))
        assert small.manifest.measured["quantize"]["kld"] <= limit
        sizes.append(small.manifest.bits_per_weight)
    assert sizes[1] < sizes[0]


def test_bytes_are_those_of_all_files(exported: Any, pairs: Path, tmp_path: Path) -> None:
    bundle, _ = exported("t5")
    before, sizes = sum(file.stat().st_size for file in bundle.glob("*.onnx*")), []
    for saved in (85_000, 65_000):
        limit = before - saved
        options = _options(pairs, budget=Budget(max_bytes=limit), data=None, measure=False, overwrite=True)
        small = quantize(bundle, tmp_path / "out", options)
        sizes.append(sum(file.stat().st_size for file in small.path.glob("*.onnx*")))
        assert sizes[-1] <= limit
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (("--target-bits", "2"), r"at least \d+\.\d+ bits per weight are needed, asked at most 2 bits per weight"),
        (("--target-size", "2KB"), r"at least 0\.\d+ MB are needed, asked at most 0.002 MB"),
        (("--max-kld", "1e-9"), r"budget missed: kld \d.* is the best that can be, asked at most 1e-09"),
    ],
)
def test_budgets_that_cannot_be_met_say_what_can(
    exported: Any, pairs: Path, tmp_path: Path, budget: tuple[str, str], reason: str
) -> None:
    bundle, _ = exported("t5")
    typed = [
        "quantize",
        str(bundle),
        "-o",
        str(tmp_path / "out"),
        "--calibration",
        str(pairs),
        "--num-samples",
        "9",
        *budget,
    ]
    result = CliRunner().invoke(app, typed)
    assert result.exit_code == 7, result.output
    assert re.search(reason, result.stderr.replace("\n", " "))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("at", "method"), [(3, "rtn"), (14, "gptq")])
def test_an_interrupted_measurement_resumes_to_the_same_bytes(
    exported: Any, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, method: str
) -> None:
    """Among the encoder's layers, and among the decoder's."""
    bundle, _ = exported("t5")
    budget = Budget(max_bits=7.0)
    whole = quantize(bundle, tmp_path / "whole", _options(pairs, method, budget=budget))
    measured = []
    damage = sensitivity.WeightProbe.damage

    def interrupt(self: WeightProbe, *args: Any) -> float:
        measured.append(args[0])
        if len(measured) == at:
            raise KeyboardInterrupt
        return damage(self, *args)

    monkeypatch.setattr(sensitivity.WeightProbe, "damage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(bundle, tmp_path / "out", _options(pairs, method, budget=budget))
    resumed = quantize(bundle, tmp_path / "out", _options(pairs, method, budget=budget, resume=True))
    assert len(measured) == len(set(measured)) + 1 == len(targets_of(_parts(bundle))) + 1
    _assert_same(whole, resumed)
