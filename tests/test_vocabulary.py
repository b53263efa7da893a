"""Trimming a vocabulary: the corpus is encoded as before, and the logits are rows of those before."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llmfast.bundle import ModelBundle
from llmfast.errors import UnsupportedError
from llmfast.export.stage import export
from llmfast.infer.engine import Engine
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.quantize.vocabulary import trim_vocabulary
from llmfast.tokenizer import Tokenizer
from llmfast.vocabulary import Vocabulary, choose_tokens, trim_settings, trim_tokenizer
from tests.conftest import write_checkpoint

CORPUS = "the cat sat on the mat; the dog sat by the door. " * 3 + "once"
OTHER = "zebras jump quickly: naïve façade №5"


def _sentences() -> list[str]:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 8))) for _ in range(300)]
    return [CORPUS, *(" ".join(rng.choice(words, 8)) for _ in range(200))]


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_sentences(), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def _word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        _sentences(),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False),
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


def _unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        _sentences(),
        trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<pad>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return backend


@pytest.mark.parametrize("make", [_byte_level, _word_piece, _unigram])
def test_the_corpus_is_encoded_as_before(make) -> None:
    before = make()
    document = json.loads(before.to_str())
    ids = before.encode(CORPUS).ids
    vocabulary = choose_tokens(document, ids, before.get_vocab_size())
    after = Backend.from_str(json.dumps(trim_tokenizer(document, vocabulary)))
    assert after.get_vocab_size() == len(vocabulary.kept) < 0.8 * before.get_vocab_size()
    assert vocabulary.kept[after.encode(CORPUS).ids].tolist() == ids
    assert after.encode(CORPUS).tokens == before.encode(CORPUS).tokens
    assert after.decode(after.encode(OTHER).ids) == before.decode(before.encode(OTHER).ids)


@pytest.mark.parametrize("make", [_byte_level, _word_piece, _unigram])
def test_added_tokens_that_the_model_has_no_row_for_are_left_out(make) -> None:
    before = make()
    rows = before.get_vocab_size()
    before.add_special_tokens(["<image_soft_token>"])
    document = json.loads(before.to_str())
    vocabulary = choose_tokens(document, before.encode(CORPUS).ids, rows)
    after = Backend.from_str(json.dumps(trim_tokenizer(document, vocabulary)))
    assert after.token_to_id("<image_soft_token>") is None
    assert after.get_vocab_size() == len(vocabulary.kept)
    assert vocabulary.kept[after.encode(CORPUS).ids].tolist() == before.encode(CORPUS).ids


@pytest.mark.parametrize(
    "processor",
    [
        processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 600)]),
        processors.BertProcessing(("<end>", 600), ("<s>", 1)),
    ],
)
def test_a_token_around_texts_needs_a_row(processor) -> None:
    before = _byte_level()
    before.add_special_tokens(["<end>"])
    before.post_processor = processor
    document = json.loads(before.to_str())
    with pytest.raises(UnsupportedError, match="token 600, which the tokenizer puts around texts"):
        trim_tokenizer(document, choose_tokens(document, [10], 600))


def test_coverage_is_what_good_and_turing_estimate() -> None:
    document = json.loads(_byte_level().to_str())
    assert choose_tokens(document, [10, 10, 11, 11, 12], 600).coverage == pytest.approx(0.8)


def test_settings_name_the_new_ids() -> None:
    vocabulary = Vocabulary(np.array([0, 2, 5, 9]), 1.0)
    before = {"vocab_size": 10, "eos_token_id": [5, 9], "bos_token_id": 2, "pad_token_id": None, "hidden_size": 5}
    after = trim_settings({"text_config": before}, vocabulary)["text_config"]
    assert after == {"vocab_size": 4, "eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": None, "hidden_size": 5}
    with pytest.raises(UnsupportedError, match="token 4"):
        trim_settings({"eos_token_id": 4}, vocabulary)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("phi", {"num_attention_heads": 2}),  # its head has a bias
    ],
)
def test_logits_are_rows_of_those_before(model_type: str, settings: dict, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", model_type, {"vocab_size": 600} | settings)
    _byte_level().save(str(folder / "tokenizer.json"))
    bundle = export(str(folder), tmp_path / "fp32")
    (tmp_path / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    (tmp_path / "trimmed").mkdir()
    trimmed, vocabulary = trim_vocabulary(bundle, tmp_path / "corpus.txt", tmp_path / "trimmed")
    assert trimmed.manifest.architecture["vocab_size"] == len(vocabulary.kept) < 600
    assert trimmed.manifest.architecture["num_parameters"] < bundle.manifest.architecture["num_parameters"]

    before, after = Engine(bundle, threads=1, max_length=256), Engine(ModelBundle.open(trimmed.path), threads=1)
    old_ids = np.array(Tokenizer.load(bundle.path).encode(CORPUS))
    new_ids = np.array(Tokenizer.load(trimmed.path).encode(CORPUS))
    np.testing.assert_array_equal(vocabulary.kept[new_ids], old_ids)
    np.testing.assert_allclose(after.score(new_ids), before.score(old_ids)[:, vocabulary.kept], rtol=1e-4, atol=1e-4)
    assert Tokenizer.load(trimmed.path).eos_ids == (vocabulary.new_id(2),)


def test_quantize_trims_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "llama", {"vocab_size": 600, "tie_word_embeddings": True})
    _byte_level().save(str(folder / "tokenizer.json"))
    export(str(folder), tmp_path / "fp32")
    (tmp_path / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    options = QuantizeOptions("int8", trim_vocabulary=tmp_path / "corpus.txt", measure=False)
    bundle = quantize(tmp_path / "fp32", tmp_path / "int8", options)
    assert "of 600 tokens stay" in capsys.readouterr().err
    assert [step.stage for step in bundle.manifest.lineage] == ["export", "trim", "quantize"]
    assert Engine(bundle, threads=1).vocab_size == bundle.manifest.architecture["vocab_size"] < 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "corpus.txt", "fp32", "int8"]


def test_a_lone_graph_is_not_trimmed(fp32_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    (tmp_path / "model.onnx").write_bytes((fp32_bundle / "model.onnx").read_bytes())
    options = QuantizeOptions("int8", trim_vocabulary=tmp_path / "corpus.txt")
    with pytest.raises(UnsupportedError, match="no bundle of llmfast's"):
        quantize(tmp_path / "model.onnx", tmp_path / "int8", options)


def test_a_word_level_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="WordLevel"):
        choose_tokens({"model": {"type": "WordLevel", "vocab": {}}}, [1], 5)
