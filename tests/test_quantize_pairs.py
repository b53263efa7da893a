"""Encoder-decoders calibrated and compared on pairs of sources and targets, against PyTorch and plain computation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, InputError, OptionError
from llmfast.graph.linear import find_linears
from llmfast.graph.model import OnnxModel
from llmfast.graph.view import attribute
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.corpus import Corpus
from llmfast.quantize.pairs import PairReader, feed_pairs
from llmfast.quantize.plan import Plan, choose_layers
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.quantize.workpiece import Workpiece
from llmfast.tokenizer import Tokenizer
from llmfast.verdict import Gate
from tests.tiny_seq2seq import LETTERS, exports_in

# Layers of the graphs, and the PyTorch modules that are given the same inputs.
SAME = {
    "t5": {
        "encoder.layers.1.fc2": "encoder.block.1.layer.1.DenseReluDense.wo",
        "decoder.layers.1.encoder_attn.kv_proj": "decoder.block.1.layer.1.EncDecAttention.k",
        "decoder.layers.1.encoder_attn.out_proj": "decoder.block.1.layer.1.EncDecAttention.o",
        "decoder.layers.1.fc1": "decoder.block.1.layer.2.DenseReluDense.wi",
    },
    "bart": {
        "encoder.layers.1.fc2": "model.encoder.layers.1.fc2",
        "decoder.layers.1.encoder_attn.kv_proj": "model.decoder.layers.1.encoder_attn.k_proj",
        "decoder.layers.1.encoder_attn.out_proj": "model.decoder.layers.1.encoder_attn.out_proj",
        "decoder.layers.1.fc1": "model.decoder.layers.1.fc1",
    },
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    return exports_in(tmp_path_factory)


def _text(rng: np.random.Generator) -> str:
    return " ".join("".join(rng.choice(list(LETTERS[:26]), 3)) for _ in range(rng.integers(2, 8)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.txt"
    rng = np.random.default_rng(0)
    path.write_text("".join(f"{_text(rng)}\t{_text(rng)}\n" for _ in range(40)), encoding="utf-8")
    return path


def _workpieces(bundle: Path, pairs: Path, count: int) -> dict[str, Workpiece]:
    opened = ModelBundle.open(bundle)
    models = {role: OnnxModel.load(path) for role, path in opened.graphs.items()}
    samples = feed_pairs(models, PairReader(opened).read(Corpus(pairs), 512)[:count])
    plan = Plan.make("int4", "rtn", {})
    return {role: Workpiece(model, choose_layers(model, plan, "", ""), samples[role]) for role, model in models.items()}


def _tokens(bundle: Path, line: str, model: Any) -> tuple[list[int], list[int]]:
    source, target = line.split("\t")
    tokenizer = Tokenizer.load(bundle)
    start = model.config.decoder_start_token_id
    return tokenizer.encode(source), [start, *tokenizer.encode(target, add_special_tokens=False), 2]


@pytest.mark.parametrize("name", SAME)
def test_statistics_are_those_of_pytorch(exported: Any, pairs: Path, name: str) -> None:
    bundle, model = exported(name)
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in SAME[name]}
    hooks = [
        model.get_submodule(module).register_forward_pre_hook(lambda _, given, kept=seen[layer]: kept.append(given[0]))
        for layer, module in SAME[name].items()
    ]
    with torch.no_grad():
        for line in pairs.read_text(encoding="utf-8").splitlines()[:5]:
            source, target = _tokens(bundle, line, model)
            model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target[:-1]]))
    for hook in hooks:
        hook.remove()
    found = {}
    for workpiece in _workpieces(bundle, pairs, 5).values():
        input_of = {one.name: one.input for one in workpiece.linears if one.name in seen}
        statistics = dict(workpiece.measure(list(dict.fromkeys(input_of.values())), gram=True))
        found |= {layer: statistics[value] for layer, value in input_of.items()}
    assert found.keys() == seen.keys()
    for layer, parts in seen.items():
        rows = torch.cat([part[0] for part in parts]).double().numpy()
        assert found[layer].num_tokens == len(rows)
        np.testing.assert_allclose(found[layer].abs_max, np.abs(rows).max(0), rtol=1e-3, atol=1e-4)
        gram = found[layer].gram
        assert gram is not None
        np.testing.assert_allclose(gram, rows.T @ rows / len(rows), rtol=1e-2, atol=1e-3)


def _weights(model: OnnxModel) -> dict[str, np.ndarray]:
    """Return layer -> weight [N, K] of the 4-bit layers, de-quantized as the operator's specification says."""
    found = {}
    halves_of = {node.output[0]: node.input[0] for node in model.proto.graph.node if node.op_type == "Cast"}
    for node in model.proto.graph.node:
        if node.op_type == "MatMulNBits" and attribute(node, "bits", 0) == 4:
            names = [halves_of.get(name, name) for name in node.input[1:4]]
            codes, scales, zero_points = (model.read(model.initializers[name]) for name in names)
            rows, blocks = codes.shape[:2]
            scales = scales.astype(np.float32).reshape(rows, blocks, 1)
            halves = zero_points.reshape(rows, -1)
            zeros = np.stack([halves & 15, halves >> 4], -1).reshape(rows, -1)[:, :blocks, None]
            values = np.stack([codes & 15, codes >> 4], -1).reshape(rows, blocks, -1)
            weight = (values.astype(np.float32) - zeros) * scales
            name = node.input[1].removesuffix(".weight_q4")
            found[name] = weight.reshape(rows, -1)[:, : attribute(node, "K", 0)]
    return found


@pytest.mark.parametrize("name", SAME)
def test_gptq_is_nearer_than_rounding_on_the_calibration_pairs(
    exported: Any, pairs: Path, tmp_path: Path, name: str
) -> None:
    bundle, _ = exported(name)
    calibration = Calibration(pairs, 30)
    made = {
        method: quantize(bundle, tmp_path / method, QuantizeOptions("int4", method, calibration=calibration))
        for method in ("rtn", "gptq")
    }
    assert made["gptq"].manifest.lineage[-1].calibration["num_samples"] == 30
    checked = 0
    for role, workpiece in _workpieces(bundle, pairs, 30).items():
        weights = {method: _weights(OnnxModel.load(one.graphs[role])) for method, one in made.items()}
        layer_of = {one.input: [] for one in workpiece.linears}
        for linear in workpiece.linears:
            layer_of[linear.input].append(linear)
        for value, statistics in workpiece.measure(list(layer_of), gram=True):
            for linear in layer_of[value]:
                errors = {}
                for method in made:
                    moved = (weights[method][linear.name] - linear.read(workpiece.model)).astype(np.float64)
                    errors[method] = np.einsum("nk,kl,nl->", moved, statistics.gram, moved)
                assert errors["gptq"] < errors["rtn"]
                checked += 1
    assert checked == sum(len(_weights(OnnxModel.load(path))) for path in made["rtn"].graphs.values())
    assert made["gptq"].manifest.measured["quantize"]["kld"] < made["rtn"].manifest.measured["quantize"]["kld"] * 1.1


@pytest.mark.parametrize(
    ("name", "scheme", "method", "settings", "largest"),
    [
        ("t5", "int8", "smoothquant,gptq", {}, 0.002),
        ("t5", "int4", "awq", {}, 0.05),
        ("t5", "int4", "rotate,gptq", {}, 0.05),
        ("t5", "int8", "smoothquant", {"activations": "static"}, 0.01),
        ("bart", "int4", "awq,gptq", {"sequential": "true"}, 0.1),
        ("bart", "int8", "rtn", {"activations": "static", "form": "operator"}, 0.01),
    ],
)
def test_every_calibrated_method_works_on_pairs(
    exported: Any, pairs: Path, tmp_path: Path, name: str, scheme: str, method: str, settings: dict, largest: float
) -> None:
    bundle, _ = exported(name)
    options = QuantizeOptions(scheme, method, settings, calibration=Calibration(pairs, 30))
    made = [quantize(bundle, tmp_path / copy, options) for copy in ("one", "two")]
    for file in made[0].path.iterdir():
        assert file.read_bytes() == (made[1].path / file.name).read_bytes()
    assert 0 < made[0].manifest.measured["quantize"]["kld"] < largest


@pytest.mark.parametrize("name", SAME)
def test_figures_are_those_of_a_plain_computation(exported: Any, pairs: Path, tmp_path: Path, name: str) -> None:
    bundle, model = exported(name)
    small = quantize(bundle, tmp_path / "int4", QuantizeOptions("int4", data=pairs, data_samples=3))
    theirs, ours = (Seq2SeqEngine(one, threads=1) for one in (ModelBundle.open(bundle), small))
    gaps, agreements = [], []
    for line in pairs.read_text(encoding="utf-8").splitlines()[:3]:
        source, target = _tokens(bundle, line, model)
        logs = []
        for engine in (theirs, ours):
            engine.encode(np.array([source]), np.ones((1, len(source)), np.int64))
            powers = np.exp(engine.score(np.array([target]))[0, :-1].astype(np.float64))
            logs.append(np.log(powers / powers.sum(-1, keepdims=True)))
        gaps.append((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1))
        agreements.append(logs[0].argmax(-1) == logs[1].argmax(-1))
    measured = small.manifest.measured["quantize"]
    assert measured["kld"] == pytest.approx(np.concatenate(gaps).mean(), rel=1e-2)
    assert measured["top1_agreement"] == pytest.approx(np.concatenate(agreements).mean())
    assert measured["text"] == {"name": "pairs.txt", "sha256": measured["text"]["sha256"], "num_samples": 3}
    with pytest.raises(GateError, match="`strict` kld"):
        options = QuantizeOptions("int4", data=pairs, gates=(Gate("kld", 1e-9, "max"),))
        quantize(bundle, tmp_path / "strict", options)


@pytest.mark.parametrize("name", SAME)
def test_missing_targets_are_what_the_float_model_writes(exported: Any, tmp_path: Path, name: str) -> None:
    bundle, model = exported(name)
    sources = tmp_path / "sources.txt"
    sources.write_text("the cat sat\na dog, two dogs\n", encoding="utf-8")
    opened = ModelBundle.open(bundle)
    reader = PairReader(opened)
    done = reader.complete(reader.read(Corpus(sources), 20), 20, "calibrate")
    for line, pair in zip(sources.read_text(encoding="utf-8").splitlines(), done, strict=True):
        ids = Tokenizer.load(bundle).encode(line)
        with torch.no_grad():
            written = model.generate(torch.tensor([ids]), do_sample=False, num_beams=1, max_length=20)[0].tolist()
        np.testing.assert_array_equal(pair.source, ids)
        assert pair.target is not None
        assert pair.target.tolist() == written


def test_lines_without_targets_calibrate_too(exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, _ = exported("bart")
    sources = tmp_path / "sources.jsonl"
    rng = np.random.default_rng(4)
    sources.write_text("".join(f'{{"text": "{_text(rng)}"}}\n' for _ in range(12)), encoding="utf-8")
    small = quantize(bundle, tmp_path / "int4", QuantizeOptions("int4", "gptq", calibration=Calibration(sources, 8)))
    said = capsys.readouterr().err
    assert "8 sources to calibrate on have no target" in said
    assert "4 sources to compare on have no target" in said
    assert small.manifest.measured["quantize"]["kld"] > 0


def test_pairs_that_are_none_are_refused(exported: Any, tmp_path: Path) -> None:
    bundle, _ = exported("t5")
    broken = tmp_path / "broken.txt"
    broken.write_text("the cat\tdie katze\nno target\n", encoding="utf-8")
    options = QuantizeOptions("int4", "gptq", calibration=Calibration(broken))
    with pytest.raises(InputError, match=r"`.*broken\.txt`: line 2"):
        quantize(bundle, tmp_path / "out", options)
    with pytest.raises(OptionError, match="--seq-len 1"):
        quantize(bundle, tmp_path / "out", QuantizeOptions("int4", "gptq", calibration=Calibration(broken, 1, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.txt"]


def test_every_graph_has_its_layers_quantized(exported: Any, pairs: Path, tmp_path: Path) -> None:
    bundle, _ = exported("bart")
    small = quantize(bundle, tmp_path / "int4", QuantizeOptions("int4", "awq,gptq", calibration=Calibration(pairs, 9)))
    for role, path in small.graphs.items():
        names = {one.name for one in find_linears(OnnxModel.load(ModelBundle.open(bundle).graphs[role]))}
        assert set(_weights(OnnxModel.load(path))) == {name for name in names if role in name or "kv_proj" in name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "int8", "--kv", "int8"], "the KV cache of `{bundle}`, an encoder-decoder, stays float"),
        (
            ["--scheme", "int8", "--trim-vocabulary", "{pairs}"],
            "the vocabulary of `{bundle}` can't be trimmed: it has an encoder and a decoder",
        ),
    ],
)
def test_what_encoder_decoders_can_not_have_is_said(
    exported: Any, pairs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    bundle, _ = exported("t5")
    typed = [argument.format(pairs=pairs) for argument in arguments]
    result = CliRunner().invoke(app, ["quantize", str(bundle), "-o", str(tmp_path / "out"), *typed])
    assert result.exit_code == 5
    assert message.format(bundle=bundle) in result.stderr
    assert list(tmp_path.iterdir()) == []
