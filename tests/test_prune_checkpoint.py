"""Pruning checkpoints: each method against the original with the same parts masked, and what is left loads and runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from llmfast import registry
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, InputError, OptionError, UnsafeInputError, UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.stage import export
from llmfast.lineage import LINEAGE, read_lineage
from llmfast.prune import speedup
from llmfast.prune.checkpoint.compensate import group_losses, group_outputs, keep_inputs
from llmfast.prune.checkpoint.workpiece import Workpiece
from llmfast.prune.methods import choose_methods
from llmfast.prune.options import PruneOptions, parse_factor, parse_params, parse_ratio
from llmfast.prune.speedup import prune_to_speed
from llmfast.prune.stage import plan, prune
from llmfast.prune.structured import width
from llmfast.quantize.calibrate import Calibration
from tests.conftest import write_checkpoint
from tests.tiny_encoder import save_encoder

METHODS = registry.names("prune.structured")
CALIBRATION = Calibration(num_samples=6, seq_len=48)
SAMPLES = list(np.random.default_rng(3).integers(3, 259, (3, 40)))


def _options(method: str, **choices: Any) -> PruneOptions:
    return PruneOptions(method, **({"calibration": CALIBRATION, "data_samples": 2} | choices))


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def _logits(model: Any, sample: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(sample[None]), use_cache=False).logits[0].double().numpy()


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def _assert_same_logits(folder: Path, reference: Any) -> None:
    pruned = _load(folder)
    for sample in SAMPLES:
        np.testing.assert_allclose(_logits(pruned, sample), _logits(reference, sample), rtol=1e-3, atol=1e-3)


def _masked_inputs(model: Any, layer: str, kept: np.ndarray) -> None:
    """Let a linear layer see zeros in all channels but those kept."""
    mask = torch.zeros(model.get_submodule(layer).in_features)
    mask[torch.from_numpy(kept)] = 1
    model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask,))


def _rows_of(part: torch.Tensor, whole: torch.Tensor) -> np.ndarray:
    """Return which rows of a weight are left of it."""
    return np.array([int((whole == row).all(1).nonzero()[0, 0]) for row in part])


def _workpiece(folder: Path, tmp_path: Path) -> Workpiece:
    workpiece = Workpiece(SafetensorsCheckpoint(folder), "text-generation", tmp_path)
    workpiece.samples = SAMPLES
    return workpiece


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name: str) -> None:
    plugin = registry.load("prune.structured", name)
    assert registry.make_options(plugin, {}) == plugin.Options()
    assert callable(plugin.prune)
    assert callable(plugin.resize)
    assert isinstance(plugin.TAKES_RATIO, bool)
    assert hasattr(plugin, "size_of") == plugin.TAKES_RATIO


@pytest.mark.parametrize("architecture", ["llama-biases", "qwen2", "qwen3", "gemma2", "smollm3", "granite-tied"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "vocabulary"])
def test_a_pruned_decoder_is_a_plain_checkpoint(
    architecture: str, method: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints(architecture)
    options = _options(method, ratios={"": 0.5})
    if (architecture, method) == ("gemma2", "width"):
        with pytest.raises(UnsupportedError, match="norms follow its layers"):
            prune(str(source), tmp_path / "pruned", options)
        return
    measured = prune(str(source), tmp_path / "pruned", options).document()
    before, after = measured["rows"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    field = registry.load("prune.structured", method).size_of(_workpiece(source, tmp_path).family)
    assert getattr(model.config, field) == getattr(SafetensorsCheckpoint(source).config, field) // 2
    assert sum(one.numel() for one in model.parameters()) == after["num_parameters"] < before["num_parameters"]
    assert np.isfinite([after["kld"], after["perplexity"], before["perplexity"]]).all()
    assert after["perplexity"] / before["perplexity"] == pytest.approx(after["perplexity_ratio"])
    assert plan(str(source), tmp_path / "other", options)[-1]["after"] == after["num_parameters"]


@pytest.mark.parametrize("methods", ["layers,ffn", "heads,width", "ffn,vocabulary"])
def test_methods_go_together_and_their_result_exports(
    methods: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Parity with PyTorch is proven by the export, which knows the steps before it."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    source = checkpoints("llama-tied")
    calibration = replace(CALIBRATION, path=corpus)
    prune(str(source), tmp_path / "pruned", _options(methods, ratios={"": 0.5}, calibration=calibration))
    bundle = export(str(tmp_path / "pruned"), tmp_path / "fp32")
    assert [(step.stage, step.method) for step in bundle.manifest.lineage] == [("prune", methods), ("export", "direct")]
    assert bundle.manifest.lineage[0].calibration["name"] == "corpus.txt"
    prune(str(tmp_path / "pruned"), tmp_path / "again", _options("ffn", ratios={"": 0.2}, measure=False))
    assert [step.method for step in read_lineage(tmp_path / "again")] == [methods, "ffn"]


@pytest.mark.parametrize("method", ["layers", "ffn", "width"])
def test_a_pruned_encoder_is_a_plain_checkpoint(method: str, tmp_path: Path) -> None:
    for model_type in ("bert", "distilbert", "roberta"):
        source = tmp_path / model_type
        settings = {"n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 48} if model_type == "distilbert" else {}
        save_encoder(source, model_type, **(settings or {"num_hidden_layers": 2}))
        output = tmp_path / f"{model_type}-pruned"
        measured = prune(str(source), output, _options(method, ratios={"": 0.5})).document()
        model, info = AutoModel.from_pretrained(output, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert sum(one.numel() for one in model.parameters()) == measured["rows"][1]["num_parameters"]
        assert ("cosine" in measured["rows"][1]) == (method != "width")


def test_a_pruned_classifier_exports_and_keeps_its_labels(tmp_path: Path) -> None:
    save_encoder(tmp_path / "bert", auto_model="AutoModelForSequenceClassification", num_labels=3)
    measured = prune(str(tmp_path / "bert"), tmp_path / "pruned", _options("width,ffn", ratios={"": 0.5})).document()
    assert 0 <= measured["rows"][1]["flipped_labels"] <= 1
    bundle = export(str(tmp_path / "pruned"), tmp_path / "fp32")
    assert len(bundle.manifest.architecture["labels"]) == 3
    assert bundle.manifest.architecture["hidden_size"] == 16
    assert bundle.manifest.lineage[0].stage == "prune"


def test_sentence_transformers_files_go_along(tmp_path: Path) -> None:
    source = tmp_path / "bert"
    save_encoder(source)
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    types = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (source / "modules.json").write_text(json.dumps(types))
    (source / "model.py").write_text("raise SystemExit")
    prune(str(source), tmp_path / "pruned", _options("width", ratios={"": 0.5}))
    kept = json.loads((tmp_path / "pruned" / "1_Pooling" / "config.json").read_text())
    assert kept == pooling | {"word_embedding_dimension": 16}
    assert (tmp_path / "pruned" / "modules.json").is_file()
    assert not (tmp_path / "pruned" / "model.py").exists()


@pytest.mark.parametrize("score", ["loss", "output", "activation"])
def test_ffn_is_the_original_with_the_channels_masked(
    score: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints("llama-biases")
    settings = {"score": score, "compensate": "false"}
    prune(str(source), tmp_path / "pruned", _options("ffn", ratios={"": 0.5}, settings=settings))
    reference, pruned = _load(source), _load(tmp_path / "pruned")
    for index in range(2):
        part, whole = (model.model.layers[index].mlp.up_proj.weight for model in (pruned, reference))
        _masked_inputs(reference, f"model.layers.{index}.mlp.down_proj", _rows_of(part, whole))
    _assert_same_logits(tmp_path / "pruned", reference)


@pytest.mark.parametrize("architecture", ["llama", "llama-one-kv-head", "qwen3"])
def test_heads_are_the_original_with_the_groups_masked(
    architecture: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints(architecture)
    prune(str(source), tmp_path / "pruned", _options("heads", ratios={"": 0.5}, settings={"compensate": "false"}))
    reference, pruned = _load(source), _load(tmp_path / "pruned")
    config = pruned.config
    assert config.num_attention_heads == 2
    assert config.num_key_value_heads == 1
    assert config.head_dim == SafetensorsCheckpoint(source).config.head_dim
    for index in range(2):
        part, whole = (model.model.layers[index].self_attn.q_proj.weight for model in (pruned, reference))
        _masked_inputs(reference, f"model.layers.{index}.self_attn.o_proj", _rows_of(part, whole))
    _assert_same_logits(tmp_path / "pruned", reference)


@pytest.mark.parametrize("score", ["loss", "influence", "angular"])
def test_layers_are_the_original_with_blocks_skipped(score: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", {"num_hidden_layers": 5, "initializer_range": 0.1})
    measured = prune(
        str(source), tmp_path / "pruned", _options("layers", ratios={"": 0.4}, settings={"score": score})
    ).document()
    dropped = measured["removed"]["layers"]["dropped"]
    assert len(dropped) == 2
    assert score != "angular" or dropped[1] == dropped[0] + 1
    reference = _load(source)
    for index in dropped:
        reference.model.layers[index].register_forward_hook(lambda _, inputs, output: inputs[0])
    _assert_same_logits(tmp_path / "pruned", reference)


def test_block_influence_is_that_of_the_paper(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", {"num_hidden_layers": 4, "initializer_range": 0.1})
    workpiece = _workpiece(source, tmp_path)
    plugin = registry.load("prune.structured", "layers")
    removed = plugin.prune(workpiece, {"num_hidden_layers": 3}, plugin.Options(score="influence"))
    states = []
    with torch.no_grad():
        for sample in SAMPLES:
            ids = torch.from_numpy(sample[None])
            model = _load(source)
            found: list[np.ndarray] = []
            for block in model.model.layers:
                block.register_forward_pre_hook(
                    lambda _, inputs, kept=found: kept.append(inputs[0][0].double().numpy())
                )
            model.model.norm.register_forward_pre_hook(
                lambda _, inputs, kept=found: kept.append(inputs[0][0].double().numpy())
            )
            model(ids, use_cache=False)
            states.append(found)
    influence = []
    for index in range(4):
        left = np.concatenate([one[index] for one in states])
        right = np.concatenate([one[index + 1] for one in states])
        cosine = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
        influence.append(1 - cosine.mean())
    assert removed["dropped"] == [int(np.argmin(influence))]


def test_the_layer_after_is_refitted_by_least_squares() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 12)) @ rng.standard_normal((12, 12))
    weight = torch.from_numpy(rng.standard_normal((5, 12))).float()
    gram = torch.from_numpy(x.T @ x / len(x)).float()
    kept = np.array([0, 2, 3, 5, 6, 8, 9, 11])
    fitted = keep_inputs(weight, gram, kept, True).numpy()
    exact = np.linalg.lstsq(x[:, kept], x @ weight.numpy().T, rcond=None)[0].T

    def error(candidate: np.ndarray) -> float:
        return float(np.square(x @ weight.numpy().T - x[:, kept] @ candidate.T).mean())

    assert error(exact) <= error(fitted) < 1.02 * error(exact)
    assert error(fitted) < 0.8 * error(weight[:, kept].numpy())
    np.testing.assert_array_equal(keep_inputs(weight, gram, kept, False), weight[:, kept])
    assert keep_inputs(weight, gram, np.arange(12), True).equal(weight)


def test_scores_are_what_the_output_loses_and_gains() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5000, 6)) @ (np.eye(6) + 0.2 * rng.standard_normal((6, 6)))
    weight = torch.from_numpy(rng.standard_normal((4, 6))).float()
    gram = torch.from_numpy(x.T @ x / len(x)).float()
    losses, outputs = group_losses(weight, gram, 2), group_outputs(weight, gram, 2)
    for group in range(3):
        gone = np.arange(2 * group, 2 * group + 2)
        kept = np.setdiff1d(np.arange(6), gone)
        _, residuals, *_ = np.linalg.lstsq(x[:, kept], x @ weight.numpy().T, rcond=None)
        assert losses[group] == pytest.approx(residuals.sum() / len(x), rel=0.1)
        assert outputs[group] == pytest.approx(
            np.square(x[:, gone] @ weight.numpy()[:, gone].T).sum(1).mean(), rel=1e-3
        )


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "llama-biases", "qwen2", "granite-tied"])
def test_the_rotation_alone_changes_nothing(
    architecture: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """All directions stay: norms folded, the stream rotated, and a shared head with weights of its own."""
    workpiece = _workpiece(checkpoints(architecture), tmp_path)
    before = workpiece.read("model.layers.0.mlp.up_proj.weight")
    options = width.Options(basis="rotation")
    width.prune(workpiece, {"hidden_size": 64, "tie_word_embeddings": False}, options)
    assert not torch.allclose(before, workpiece.read("model.layers.0.mlp.up_proj.weight"), atol=0.1)
    reference = _load(checkpoints(architecture))
    for sample in SAMPLES:
        ours, theirs = _logits(workpiece.model, sample), _logits(reference, sample)
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


def test_channels_keep_a_shared_head_shared(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    tied = checkpoints("llama-tied")
    for basis, is_tied in (("auto", True), ("channels", True), ("rotation", False)):
        settings = {"basis": basis}
        prune(str(tied), tmp_path / basis, _options("width", ratios={"": 0.25}, settings=settings))
        model = _load(tmp_path / basis)
        assert model.config.tie_word_embeddings is is_tied
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied
        assert model.config.hidden_size == 48
        assert model.config.head_dim == 16


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vocabulary"])
def test_no_share_is_the_same_model(method: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints("llama-tied")
    measured = prune(str(source), tmp_path / "same", _options(method, ratios={"": 0.0})).document()
    before, after = _load(source).state_dict(), _load(tmp_path / "same").state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert measured["rows"][1]["kld"] == pytest.approx(0, abs=1e-6)
    assert measured["rows"][1]["num_parameters"] == measured["rows"][0]["num_parameters"]


def test_the_same_options_give_the_same_bytes(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        options = _options("layers,ffn,heads", target_params=0.6, calibration=replace(CALIBRATION, seed=5))
        prune(str(checkpoints("llama-tied")), tmp_path / name / "out", options)
    files = sorted(file.name for file in (tmp_path / "one" / "out").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", LINEAGE} <= set(files)
    for name in files:
        assert (tmp_path / "one" / "out" / name).read_bytes() == (tmp_path / "two" / "out" / name).read_bytes(), name


def test_weights_are_stored_in_the_type_they_had(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoints("llama-tied") / name, tmp_path / "half" / name)
    prune(str(tmp_path / "half"), tmp_path / "pruned", _options("ffn", ratios={"": 0.25}))
    stored = SafetensorsCheckpoint(tmp_path / "pruned")
    assert stored.stored_type == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto").dtype == torch.bfloat16


def test_a_target_is_met_by_the_least_that_does(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = str(checkpoints("llama-tied"))
    measured = prune(source, tmp_path / "pruned", _options("heads,ffn", target_params=0.7)).document()
    before, after = (row["num_parameters"] for row in measured["rows"])
    channel_step = 8 * 3 * 64 * 2
    assert 0.7 * before - channel_step < after <= 0.7 * before
    with pytest.raises(OptionError, match="at least"):
        plan(source, tmp_path / "x", _options("ffn", target_params=0.3))


def test_a_target_is_divided_by_what_is_lost(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _options("heads,ffn", target_params=0.75, allocation="sensitivity")
    measured = prune(str(checkpoints("llama-tied")), tmp_path / "pruned", options).document()
    lines = [line for line in capsys.readouterr().err.splitlines() if "parameters, loss " in line]
    losses = {line.partition(":")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert len(losses) >= 2
    best = min(losses, key=lambda name: losses[name])
    assert best == ", ".join(f"{name} {ratio:.1%}" for name, ratio in measured["ratios"].items())


class _FakeTimes:
    """Speeds that follow from the sizes alone."""

    def __init__(self, source: Path, *_: Any) -> None:
        self._before = self._cost(source)

    def __enter__(self) -> "_FakeTimes":
        return self

    def __exit__(self, *_: Any) -> None: ...

    @staticmethod
    def _cost(folder: Path) -> float:
        return 1e5 + sum(parameter.numel() for parameter in _load(folder).parameters())

    def measure(self, folder: Path) -> dict[str, float]:
        ratio = self._before / self._cost(folder)
        return {"prefill_tokens_per_s_ratio": ratio, "decode_tokens_per_s_ratio": ratio * 1.1}


def test_a_speed_is_reached_by_measuring(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedup, "SpeedTest", _FakeTimes)
    monkeypatch.setattr("llmfast.prune.checkpoint.stage.SpeedTest", _FakeTimes)
    source = str(checkpoints("llama-tied"))
    measured = prune_to_speed(source, tmp_path / "fast", _options("layers,ffn"), 1.15).document()
    speed = measured["rows"][1]["prefill_tokens_per_s_ratio"]
    assert speed >= 1.15
    assert speed == pytest.approx(_FakeTimes(Path(source)).measure(tmp_path / "fast")["prefill_tokens_per_s_ratio"])
    assert {entry["figure"] for entry in measured["gates"]} == set(_FakeTimes(Path(source)).measure(Path(source)))
    with pytest.raises(GateError, match="3 times as fast"):
        prune_to_speed(source, tmp_path / "x", _options("ffn"), 3)
    with pytest.raises(OptionError, match="makes nothing faster"):
        prune_to_speed(source, tmp_path / "x", _options("wanda"), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast"]


def test_trimming_keeps_the_logits_of_the_tokens_that_stay(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("abc ab", encoding="utf-8")
    source = write_checkpoint(tmp_path / "source", "llama", {"tie_word_embeddings": True, "vocab_size": 320})
    options = _options("vocabulary", calibration=Calibration(corpus))
    prune(str(source), tmp_path / "pruned", options)
    before = transformers.AutoTokenizer.from_pretrained(source)
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert before.convert_ids_to_tokens(before("abc ab").input_ids) == after.convert_ids_to_tokens(
        after("abc ab").input_ids
    )
    kept = before.convert_tokens_to_ids([after.convert_ids_to_tokens(index) for index in range(len(after))])
    old, new = np.array(before("abc ab").input_ids), np.array(after("abc ab").input_ids)
    np.testing.assert_allclose(
        _logits(_load(tmp_path / "pruned"), new), _logits(_load(source), old)[:, kept], rtol=1e-4, atol=1e-4
    )
    assert _load(tmp_path / "pruned").config.vocab_size == len(kept) < 320


def test_a_missed_gate_leaves_nothing(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    result = _run(
        checkpoints("llama-tied"), "-o", tmp_path / "out", "--method", "ffn", "--ratio", "0.5", "--num-samples", "4",
        "--seq-len", "48", "--max-kld", "0.0001", "--max-perplexity-ratio", "9"
    )  # fmt: skip
    assert result.exit_code == 7
    assert "kld" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    source = checkpoints("llama-tied")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    result = _run(
        source, "-o", tmp_path / "out", "--method", "ffn", "--ratio", "0.5", "--no-measure",
        "--num-samples", "2", "--seq-len", "48"
    )  # fmt: skip
    assert result.exit_code == 6, result.output
    assert "No space left" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_one_document(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = [checkpoints("llama-tied"), "-o", tmp_path / "out", "--method", "layers,ffn", "--num-samples", "4"]
    arguments += ["--seq-len", "48"]
    result = _run(*arguments, "--ratio", "layers=0.5,ffn=0.25", "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ratios"] == {"layers": 0.5, "ffn": 0.25}
    assert document["rows"][1]["expected_prefill_speedup"] > 2
    assert "expected_speedup" not in document["rows"][1]
    assert _run(*arguments, "--ratio", "0.5").exit_code == 8
    result = _run(*arguments, "--ratio", "0.4", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "layers: 40.0% is rounded to 50.0%" in result.stderr
    assert "perplexity" in result.stdout
    assert _run(*arguments, "--ratio", "0.5", "--dry-run", "--overwrite").exit_code == 0


def test_only_what_llmfast_wrote_is_overwritten(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    foreign = Path(shutil.copytree(checkpoints("llama-tied"), tmp_path / "foreign"))
    result = _run(checkpoints("llama"), "-o", foreign, "--method", "ffn", "--ratio", "0.5", "--overwrite")
    assert result.exit_code == 8
    assert (foreign / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--method", "ffn", "--ratio", "1"], 2, "removes everything"),
        (["--method", "ffn", "--ratio", "-0.1"], 2, "not a share"),
        (["--method", "ffn", "--ratio", "nan"], 2, "not a share"),
        (["--method", "ffn", "--ratio", "half"], 2, "not a share"),
        (["--method", "ffn", "--ratio", "0.99"], 2, "removes all 96 channels"),
        (["--method", "layers", "--ratio", "0.9"], 2, "removes all 2 blocks"),
        (["--method", "heads", "--ratio", "0.9"], 2, "removes all 4 heads"),
        (["--method", "width", "--ratio", "0.99"], 2, "removes all 64 hidden channels"),
        (["--method", "fnn", "--ratio", "0.5"], 2, "did you mean `ffn`?"),
        (["--method", "ffn,ffn", "--ratio", "0.5"], 2, "one method of a kind"),
        (["--method", "ffn"], 2, "no share for ffn"),
        (["--method", "ffn", "--ratio", "layers=0.5"], 2, "not a method of this run"),
        (["--method", "ffn", "--ratio", "0.5", "--target-params", "50%"], 2, "contradict"),
        (["--method", "ffn", "--target-params", "few"], 2, "not a number of parameters"),
        (["--method", "ffn", "--target-params", "100%"], 2, "not below 100%"),
        (["--method", "ffn", "--target-speedup", "0.9x"], 2, "not a factor above 1"),
        (["--method", "ffn", "--ratio", "0.5", "--pattern", "2:4"], 2, "--pattern says what goes"),
        (["--method", "ffn", "--ratio", "0.5", "--set", "score=best"], 2, "unknown score"),
        (["--method", "ffn", "--ratio", "0.5", "--set", "skore=loss"], 2, "did you mean `score`?"),
        (["--method", "ffn", "--ratio", "0.5", "--allocation", "sensitivity"], 2, "divides --target-params"),
        (["--method", "ffn", "--ratio", "0.5", "--no-measure", "--max-kld", "1"], 2, "nothing to judge"),
        (["--method", "vocabulary"], 2, "--calibration FILE"),
        (["--method", "vocabulary", "--ratio", "0.5"], 2, "takes no share"),
        (["--method", "wanda", "--ratio", "0.5"], 2, "is a PyTorch checkpoint"),
        (["--method", "ffn,wanda", "--ratio", "0.5"], 2, "works on an ONNX graph"),
        (["--method", "ffn", "--ratio", "0.5", "--calibration", "missing.txt"], 3, "missing.txt"),
    ],
)
def test_bad_options_are_explained(
    arguments: list[str], code: int, words: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    result = _run(checkpoints("llama-tied"), "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.count("error: ") == 1
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints_are_explained(own_checkpoint: Path, tmp_path: Path) -> None:
    options, output = _options("ffn", ratios={"": 0.5}), tmp_path / "out"
    with pytest.raises(InputError, match="not found"):
        prune(str(tmp_path / "missing"), output, options)
    save_encoder(tmp_path / "convbert", "convbert")
    with pytest.raises(UnsupportedError, match="a `convbert` can't be pruned"):
        prune(str(tmp_path / "convbert"), output, options)
    save_encoder(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="hidden size / heads"):
        prune(str(tmp_path / "bert"), output, _options("heads", ratios={"": 0.5}))
    weights = own_checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="truncated"):
        prune(str(own_checkpoint), output, options)
    weights.rename(own_checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsafeInputError, match="pickle"):
        prune(str(own_checkpoint), output, options)
    (own_checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="weights missing"):
        prune(str(own_checkpoint), output, options)
    (own_checkpoint / LINEAGE).write_text('{"format": 9, "lineage": []}')
    with pytest.raises(InputError, match="format 9"):
        read_lineage(own_checkpoint)
    assert not output.exists()


def test_heads_of_a_llama_are_rounded_to_what_its_config_takes(tmp_path: Path) -> None:
    """Llama's config insists that the number of heads divides the hidden size, though it says their width."""
    settings = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    source = write_checkpoint(tmp_path / "source", "llama", settings)
    for ratio, heads in ((0.2, 8), (0.3, 4), (0.45, 4), (0.7, 2)):
        rows = plan(str(source), tmp_path / "x", _options("heads", ratios={"": ratio}))
        assert rows[0]["after"] == heads, ratio


def test_typed_numbers() -> None:
    assert parse_ratio("layers=0.1, ffn=0.3") == {"layers": 0.1, "ffn": 0.3}
    assert parse_params("100M") == 1e8
    assert parse_params("75%") == 0.75
    assert parse_params("1.5b") == 1.5e9
    assert parse_factor("1.3x") == 1.3
    assert [one.name for one in choose_methods(_options("vocabulary,ffn", ratios={"": 0.1}))[1]] == [
        "ffn",
        "vocabulary",
    ]


def test_a_bundle_is_no_checkpoint(fp32_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="works on a PyTorch checkpoint"):
        prune(str(fp32_bundle), tmp_path / "out", _options("ffn", ratios={"": 0.5}))
    assert ModelBundle.open(fp32_bundle)
