"""Methods that prune checkpoints: each against the original with the same parts masked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmfast import registry
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.prune.checkpoint.compensate import group_losses, group_outputs, keep_inputs
from llmfast.prune.checkpoint.workpiece import Workpiece
from llmfast.prune.stage import plan, prune
from llmfast.prune.structured import width
from llmfast.quantize.calibrate import Calibration
from tests.conftest import write_checkpoint
from tests.tiny_prune import METHODS, load_decoder, options_of

SAMPLES = list(np.random.default_rng(3).integers(3, 259, (3, 40)))


def _logits(model: Any, sample: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(sample[None]), use_cache=False).logits[0].double().numpy()


def _assert_same_logits(folder: Path, reference: Any) -> None:
    pruned = load_decoder(folder)
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


@pytest.mark.parametrize("score", ["loss", "output", "activation"])
def test_ffn_is_the_original_with_the_channels_masked(
    score: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints("llama-biases")
    settings = {"score": score, "compensate": "false"}
    prune(str(source), tmp_path / "pruned", options_of("ffn", ratios={"": 0.5}, settings=settings))
    reference, pruned = load_decoder(source), load_decoder(tmp_path / "pruned")
    for index in range(2):
        part, whole = (model.model.layers[index].mlp.up_proj.weight for model in (pruned, reference))
        _masked_inputs(reference, f"model.layers.{index}.mlp.down_proj", _rows_of(part, whole))
    _assert_same_logits(tmp_path / "pruned", reference)


@pytest.mark.parametrize("architecture", ["llama", "llama-one-kv-head", "qwen3"])
def test_heads_are_the_original_with_the_groups_masked(
    architecture: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints(architecture)
    prune(str(source), tmp_path / "pruned", options_of("heads", ratios={"": 0.5}, settings={"compensate": "false"}))
    reference, pruned = load_decoder(source), load_decoder(tmp_path / "pruned")
    config = pruned.config
    assert config.num_attention_heads == 2
    assert config.num_key_value_heads == 1
    assert config.head_dim == SafetensorsCheckpoint(source).config.head_dim
    for index in range(2):
        part, whole = (model.model.layers[index].self_attn.q_proj.weight for model in (pruned, reference))
        _masked_inputs(reference, f"model.layers.{index}.self_attn.o_proj", _rows_of(part, whole))
    _assert_same_logits(tmp_path / "pruned", reference)


def test_heads_of_a_llama_are_rounded_to_what_its_config_takes(tmp_path: Path) -> None:
    """Llama's config insists that the number of heads divides the hidden size, though it says their width."""
    settings = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    source = write_checkpoint(tmp_path / "source", "llama", settings)
    for ratio, heads in ((0.2, 8), (0.3, 4), (0.45, 4), (0.7, 2)):
        rows = plan(str(source), tmp_path / "x", options_of("heads", ratios={"": ratio}))
        assert rows[0]["after"] == heads, ratio


@pytest.mark.parametrize("score", ["loss", "influence", "angular"])
def test_layers_are_the_original_with_blocks_skipped(score: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", {"num_hidden_layers": 5, "initializer_range": 0.1})
    measured = prune(
        str(source), tmp_path / "pruned", options_of("layers", ratios={"": 0.4}, settings={"score": score})
    ).document()
    dropped = measured["removed"]["layers"]["dropped"]
    assert len(dropped) == 2
    assert score != "angular" or dropped[1] == dropped[0] + 1
    reference = load_decoder(source)
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
            model = load_decoder(source)
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
    reference = load_decoder(checkpoints(architecture))
    for sample in SAMPLES:
        ours, theirs = _logits(workpiece.model, sample), _logits(reference, sample)
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


def test_channels_keep_a_shared_head_shared(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    tied = checkpoints("llama-tied")
    for basis, is_tied in (("auto", True), ("channels", True), ("rotation", False)):
        settings = {"basis": basis}
        prune(str(tied), tmp_path / basis, options_of("width", ratios={"": 0.25}, settings=settings))
        model = load_decoder(tmp_path / basis)
        assert model.config.tie_word_embeddings is is_tied
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied
        assert model.config.hidden_size == 48
        assert model.config.head_dim == 16


def test_trimming_keeps_the_logits_of_the_tokens_that_stay(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("abc ab", encoding="utf-8")
    source = write_checkpoint(tmp_path / "source", "llama", {"tie_word_embeddings": True, "vocab_size": 320})
    options = options_of("vocabulary", calibration=Calibration(corpus))
    prune(str(source), tmp_path / "pruned", options)
    before = transformers.AutoTokenizer.from_pretrained(source)
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert before.convert_ids_to_tokens(before("abc ab").input_ids) == after.convert_ids_to_tokens(
        after("abc ab").input_ids
    )
    kept = before.convert_tokens_to_ids([after.convert_ids_to_tokens(index) for index in range(len(after))])
    old, new = np.array(before("abc ab").input_ids), np.array(after("abc ab").input_ids)
    np.testing.assert_allclose(
        _logits(load_decoder(tmp_path / "pruned"), new),
        _logits(load_decoder(source), old)[:, kept],
        rtol=1e-4,
        atol=1e-4,
    )
    assert load_decoder(tmp_path / "pruned").config.vocab_size == len(kept) < 320


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vocabulary"])
def test_no_share_is_the_same_model(method: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints("llama-tied")
    measured = prune(str(source), tmp_path / "same", options_of(method, ratios={"": 0.0})).document()
    before, after = load_decoder(source).state_dict(), load_decoder(tmp_path / "same").state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert measured["rows"][1]["kld"] == pytest.approx(0, abs=1e-6)
    assert measured["rows"][1]["num_parameters"] == measured["rows"][0]["num_parameters"]
