"""Encoder-decoders against PyTorch: logits, cached decoding, beams, and what `generate` finds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from llmfast.bundle import ModelBundle
from llmfast.errors import GateError, InputError, OptionError, UnsupportedError
from llmfast.export import seq2seq_layers, seq2seq_parity
from llmfast.export.stage import ExportOptions, describe_export, export
from llmfast.graph.model import OnnxModel
from llmfast.infer.rules import read_rules
from llmfast.infer.search import search
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.quantize.stage import QuantizeOptions, quantize
from tests.tiny_seq2seq import ARCHITECTURES, InProcess, exports_in, save_seq2seq

# Random models hardly ever end by themselves: many tokens end, and no token may come twice.
_ENDING = {"eos_token_id": [2, *range(9, 80, 11)], "no_repeat_ngram_size": 1}
# Searches as generation_config.json spells them; all models get the first two.
SEARCHES: list[dict[str, Any]] = [
    _ENDING,
    _ENDING | {"num_beams": 4},
    {"num_beams": 4},
    {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "min_length": 8},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.6},
    {"num_beams": 2, "length_penalty": -1.0, "repetition_penalty": 1.3, "bad_words_ids": [[9], [10, 11], [2]]},
    {"no_repeat_ngram_size": 2, "suppress_tokens": [20, 21], "begin_suppress_tokens": [30], "min_new_tokens": 5},
    {"num_beams": 4, "forced_bos_token_id": 5, "renormalize_logits": True, "begin_suppress_tokens": [31]},
    {"num_beams": 5, "eos_token_id": [2, 40, 41], "remove_invalid_values": True},
    _ENDING | {"min_length": 20, "min_new_tokens": 3},
]
CASES = [(name, number) for name in ARCHITECTURES for number in (0, 1)]
CASES += [(name, number) for name in ("bart", "t5") for number in range(2, len(SEARCHES))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[ModelBundle, Any]]:
    get = exports_in(tmp_path_factory)

    def opened(name: str) -> tuple[ModelBundle, Any]:
        bundle, model = get(name)
        return ModelBundle.open(bundle), model

    return opened


def make_sources(model: Any, count: int = 20, longest: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, longest, count)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(7, min(model.config.vocab_size, 90), mask.shape)
    return np.where(mask == 1, ids, model.config.pad_token_id), mask


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_match_pytorch_over_a_padded_batch(exported: Any, name: str) -> None:
    bundle, model = exported(name)
    ids, mask = make_sources(model, 3)
    targets = np.random.default_rng(2).integers(7, bundle.manifest.architecture["vocab_size"], (3, 15))
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(targets)
        ).logits.numpy()
    encoder, decoder = (
        onnxruntime.InferenceSession(bundle.graphs[role], providers=["CPUExecutionProvider"])
        for role in ("encoder", "decoder")
    )
    names = [value.name for value in encoder.get_outputs()]
    cross = dict(zip(names, encoder.run(None, {"input_ids": ids, "attention_mask": mask}), strict=True))
    feeds = {
        "input_ids": targets,
        "seqlens_k": np.full(3, 14, np.int32),
        "total_sequence_length": np.array(15, np.int32),
        "num_logits": np.array([15]),
        "encoder_attention_mask": mask,
    }
    for value in decoder.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros((3, value.shape[1], 0, value.shape[3]), np.float32)
    logits = decoder.run(["logits"], feeds | cross)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    # Probabilities must tell the models apart, or the comparison above would say nothing.
    assert expected.std(-1).mean() > 0.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_manifest_tells_sizes_and_parity(exported: Any, name: str) -> None:
    bundle, model = exported(name)
    facts = bundle.manifest.architecture
    assert list(bundle.manifest.graphs) == ["encoder", "decoder"]
    parity = bundle.manifest.measured["export"]["parity"]
    assert parity["argmax_agreement"] == 1.0
    assert 0 < parity["max_abs_diff"] < 1e-3
    trained = sum(one.numel() for key, one in model.named_parameters() if "embed_positions" not in key)
    trained += sum((one.shape[0] - 2) * one.shape[1] for key, one in _learned_positions(model))
    trained += model.final_logits_bias.numel() if hasattr(model, "final_logits_bias") else 0
    assert facts["num_parameters"] == trained
    assert bundle.manifest.bits_per_weight == 32


def _learned_positions(model: Any) -> list[tuple[str, torch.Tensor]]:
    if model.config.model_type not in ("bart", "mbart"):
        return []
    return [(key, one) for key, one in model.named_parameters() if "embed_positions" in key]


def test_what_the_stacks_share_is_stored_once(exported: Any) -> None:
    bundle, _ = exported("t5")
    models = {role: OnnxModel.load(path) for role, path in bundle.graphs.items()}
    places = {
        role: [(entry.key, entry.value) for entry in model.initializers["shared.weight"].external_data]
        for role, model in models.items()
    }
    assert places["encoder"] == places["decoder"] != []
    decoder = [node.op_type for node in models["decoder"].proto.graph.node]
    assert decoder.count("GroupQueryAttention") == decoder.count("MultiHeadAttention") == 2
    # Keys and values of the source are the encoder's work alone.
    assert not any("encoder_attn.kv_proj" in tensor for tensor in models["decoder"].initializers)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_search_finds_what_generate_finds(exported: Any, name: str, number: int) -> None:
    bundle, model = exported(name)
    ids, mask = make_sources(model)
    settings = SEARCHES[number]
    with torch.no_grad():
        expected = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=24,
            do_sample=False,
            **settings,
        )
    engine = Seq2SeqEngine(bundle, threads=1)
    rules = read_rules(bundle.path, engine.context_length, 24, **settings)
    engine.encode(ids, mask)
    found = search(engine, rules)
    for one, reference in zip(found, expected[:, 1:].tolist(), strict=True):
        end = next((place for place, token in enumerate(reference) if token in rules.eos_token_ids), None)
        assert one.ids == reference[:end]
        assert one.finish_reason == ("length" if end is None else "eos")


def test_answers_of_a_batch_have_different_lengths(exported: Any) -> None:
    """What the test above relies on."""
    for name in ("bart", "t5", "m2m_100"):
        bundle, model = exported(name)
        engine = Seq2SeqEngine(bundle, threads=1)
        engine.encode(*make_sources(model))
        for settings in SEARCHES[:2]:
            found = search(engine, read_rules(bundle.path, None, 24, **settings))
            assert len({len(one.ids) for one in found}) > 5


def test_reordered_rows_go_on_from_their_parents(exported: Any) -> None:
    bundle, model = exported("bart")
    ids, mask = make_sources(model, 2)
    engine = Seq2SeqEngine(bundle, threads=1)
    engine.encode(ids, mask)
    engine.start(6, 12)
    rng = np.random.default_rng(3)
    rows = np.zeros((6, 0), np.int64)
    for _ in range(12):
        tokens = rng.integers(7, 90, (6, 1))
        rows = np.concatenate([rows, tokens], 1)
        logits = engine.decode(tokens).copy()
        parents = rng.integers(0, 3, (2, 3)) + np.array([[0], [3]])
        engine.reorder(parents.reshape(-1))
        with torch.no_grad():
            expected = model(
                input_ids=torch.tensor(ids.repeat(3, 0)),
                attention_mask=torch.tensor(mask.repeat(3, 0)),
                decoder_input_ids=torch.tensor(rows),
            ).logits[:, -1]
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
        rows = rows[parents.reshape(-1)]


def test_a_past_that_rows_share_is_not_copied(exported: Any) -> None:
    bundle, model = exported("bart")
    engine = Seq2SeqEngine(bundle, threads=1)
    engine.encode(*make_sources(model, 1))
    engine.start(2, 8)
    for tokens in ([[7], [8]], [[9], [10]]):
        engine.decode(np.array(tokens))
    engine.reorder(np.array([0, 0]))
    engine.decode(np.array([[11], [12]]))
    engine._slab[:, 1, :, :2] = 99.0  # what the rows have in common
    engine.reorder(np.array([0, 0]))
    assert (engine._slab[:, 1, :, :2] == 99.0).all()
    np.testing.assert_array_equal(engine._slab[:, 1, :, 2], engine._slab[:, 0, :, 2])


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize(("scheme", "correlation"), [("int8", 0.999), ("int4", 0.97), ("fp16", 0.99999)])
def test_quantized_models_stay_near(exported: Any, tmp_path: Path, name: str, scheme: str, correlation: float) -> None:
    source, model = exported(name)
    bundle = quantize(source.path, tmp_path / scheme, QuantizeOptions(scheme))
    # Scales, float32 norms and small tables weigh much in a model this small.
    assert bundle.manifest.bits_per_weight < (24 if scheme == "fp16" else 16)
    targets = np.random.default_rng(2).integers(7, 90, (3, 15))
    scores = []
    for one in (source, bundle):
        engine = Seq2SeqEngine(one, threads=1)
        engine.encode(*make_sources(model, 3))
        scores.append(engine.score(targets).ravel())
    assert np.corrcoef(*scores)[0, 1] > correlation
    assert search(engine, read_rules(bundle.path, None, 8, num_beams=2))


def test_a_wrong_graph_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_seq2seq(tmp_path / "checkpoint", "t5")
    monkeypatch.setattr(seq2seq_parity, "Worker", InProcess)
    monkeypatch.setattr(seq2seq_layers.StackWriter, "attention_settings", lambda self: {})
    with pytest.raises(GateError, match="differs from PyTorch: batch of "):
        export(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_export_in_processes_of_their_own(tmp_path: Path) -> None:
    save_seq2seq(tmp_path / "checkpoint", "marian")
    assert "an encoder and a decoder for translation" in describe_export(
        str(tmp_path / "checkpoint"), tmp_path / "bundle", ExportOptions()
    )
    bundle = export(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert bundle.manifest.task == "translation"
    export(str(tmp_path / "checkpoint"), tmp_path / "again")
    for file in bundle.path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_settings_in_config_json_become_generation_config_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_seq2seq(tmp_path / "checkpoint", "bart")
    (tmp_path / "checkpoint" / "generation_config.json").unlink()
    path = tmp_path / "checkpoint" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": 3, "no_repeat_ngram_size": 2}))
    monkeypatch.setattr(seq2seq_parity, "Worker", InProcess)
    bundle = export(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    rules = read_rules(bundle.path, 64)
    assert (rules.num_beams, rules.no_repeat_ngram_size, rules.decoder_start_token_id) == (3, 2, 2)


def test_unsupported_architectures_are_named(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("led", d_model=16, encoder_layers=1, decoder_layers=1)
    config.architectures = ["LEDForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    torch_free = {"__metadata__": {}}
    header = json.dumps(torch_free).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="architecture `led` is not supported for sequence-to-sequence"):
        export(str(tmp_path), tmp_path.parent / "bundle", ExportOptions(task="translation"))


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"sequence_bias": [[[5], 1.0]]}, UnsupportedError, "sets sequence_bias"),
        ({"encoder_no_repeat_ngram_size": 3}, UnsupportedError, "sets encoder_no_repeat_ngram_size to 3"),
        ({"num_beams": 0}, OptionError, "--num-beams 0"),
        ({"no_repeat_ngram_size": -1}, OptionError, "--no-repeat-ngram-size -1"),
        ({"decoder_start_token_id": None, "bos_token_id": None}, InputError, "no decoder_start_token_id"),
        ({"num_beams": "four"}, InputError, "malformed settings"),
        ({"bad_words_ids": [3]}, InputError, "malformed settings"),
    ],
)
def test_settings_are_read_or_refused(tmp_path: Path, settings: dict, error: type, reason: str) -> None:
    known = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(known | settings))
    with pytest.raises(error, match=reason):
        read_rules(tmp_path, 64)


def test_lengths_follow_user_then_model_then_default(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    known = {"decoder_start_token_id": 1, "eos_token_id": 2, "do_sample": True}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(known))
    assert read_rules(tmp_path, None).max_length == 257
    assert "asks for sampling" in capsys.readouterr().err
    path.write_text(json.dumps(known | {"max_length": 30}))
    assert read_rules(tmp_path, None).max_length == 30
    assert read_rules(tmp_path, None, 7).max_length == 8
    assert read_rules(tmp_path, 20).max_length == 20
    with pytest.raises(OptionError, match="--max-tokens 0"):
        read_rules(tmp_path, None, 0)


def test_sources_that_do_not_fit(exported: Any) -> None:
    engine = Seq2SeqEngine(exported("bart")[0], threads=1)
    with pytest.raises(InputError, match="65 tokens, the model has 64 positions"):
        engine.encode(np.ones((1, 65), np.int64), np.ones((1, 65), np.int64))
    with pytest.raises(InputError, match="it has no token"):
        engine.encode(np.ones((2, 3), np.int64), np.array([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(InputError, match="a token of the source is not in the model's vocabulary"):
        engine.encode(np.full((1, 3), engine.vocab_size), np.ones((1, 3), np.int64))


def test_other_bundles_are_no_encoder_decoders(fp32_bundle: Path) -> None:
    with pytest.raises(UnsupportedError, match="no encoder-decoder: it has the graphs model"):
        Seq2SeqEngine(ModelBundle.open(fp32_bundle))
    with pytest.raises(UnsupportedError, match="provider `cuda`"):
        Seq2SeqEngine(ModelBundle.open(fp32_bundle), provider="cuda")
