import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from llmfast.bundle import Manifest, ModelBundle
from llmfast.errors import InputError, UnsupportedError
from llmfast.export.traced import write_traced
from llmfast.tasks import feature_extraction, text_classification
from llmfast.tokenizer import Tokenizer
from tests.tiny_encoder import WORDS, save_encoder, save_tokenizer

TEXTS = ["the cat sat on a mat", "two dogs", "the the the the the the the the the the", "run"] * 12
TABLE = np.random.default_rng(0).normal(size=(len(WORDS), 3)).astype(np.float32)


def make_bundle(
    folder: Path,
    output: str,
    architecture: dict[str, object],
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
) -> ModelBundle:
    """Make a model that looks words up: `last_hidden_state` [batch, seq, 3], or `logits`, their sum over the text."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["words"])]
    if output == "logits":
        nodes += [
            helper.make_node("Unsqueeze", ["attention_mask", "last"], ["wide"]),
            helper.make_node("Cast", ["wide"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["words", "mask"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "middle"], [output], keepdims=0),
        ]
    else:
        nodes += [helper.make_node("Identity", ["words"], [output])]
    shape = ["batch", 3] if output == "logits" else ["batch", "sequence", 3]
    graph = helper.make_graph(
        nodes,
        "words",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(TABLE, "table"),
            numpy_helper.from_array(np.array([2]), "last"),
            numpy_helper.from_array(np.array([1]), "middle"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    save_tokenizer(folder)
    return ModelBundle(folder, Manifest("unknown", architecture=architecture), folder / "model.onnx")


def word_sum(text: str) -> np.ndarray:
    return TABLE[[2, *(WORDS.index(word) for word in text.split()), 3]].astype(np.float64).sum(0)


def test_embeddings_equal_pytorch_text_by_text(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, vocab_size=len(WORDS))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    (tmp_path / "modules.json").write_text(
        json.dumps(
            [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1"}, {"type": "Normalize", "path": "2"}]
        )
    )
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text('{"pooling_mode": "mean"}')
    traced = write_traced(tmp_path, "feature-extraction", tmp_path)
    bundle = ModelBundle(
        tmp_path, Manifest("feature-extraction", architecture=traced.architecture), tmp_path / "model.onnx"
    )
    answers = feature_extraction.answer(bundle, TEXTS, threads=1)
    assert [found["text"] for found in answers] == TEXTS
    tokenizer = Tokenizer.load(tmp_path)
    for text, found in zip(TEXTS[:4], answers, strict=False):
        ids = tokenizer.encode(text)
        ids = ids if len(ids) <= 9 else [*ids[:8], ids[-1]]
        with torch.no_grad():
            vector = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(found["embedding"], vector / vector.norm(), rtol=1e-3, atol=1e-5)


def test_embedding_of_a_graph_without_one_is_the_mean(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "last_hidden_state", {})
    answers = feature_extraction.answer(bundle, TEXTS[:4])
    for text, found in zip(TEXTS[:4], answers, strict=True):
        np.testing.assert_allclose(found["embedding"], word_sum(text) / (len(text.split()) + 2), rtol=1e-5)


def test_one_label_of_several(tmp_path: Path) -> None:
    labels = ["bad", "so so", "good"]
    bundle = make_bundle(tmp_path, "logits", {"labels": labels, "problem_type": "single_label_classification"})
    for text, found in zip(TEXTS, text_classification.answer(bundle, TEXTS), strict=True):
        powers = np.exp(word_sum(text))
        np.testing.assert_allclose(list(found["scores"].values()), powers / powers.sum(), rtol=1e-5)
        assert list(found["scores"]) == labels
        assert (found["text"], found["label"]) == (text, labels[int(powers.argmax())])
        assert found["score"] == max(found["scores"].values())


def test_several_labels_and_regression(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "logits", {"problem_type": "multi_label_classification"})
    [found] = text_classification.answer(bundle, ["two dogs"])
    expected = 1 / (1 + np.exp(-word_sum("two dogs")))
    np.testing.assert_allclose([found["scores"][f"LABEL_{index}"] for index in range(3)], expected, rtol=1e-5)
    bundle = make_bundle(tmp_path, "logits", {"problem_type": "regression"})
    [found] = text_classification.answer(bundle, ["two dogs"])
    np.testing.assert_allclose(list(found["scores"].values()), word_sum("two dogs"), rtol=1e-5)


def test_no_texts(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "last_hidden_state", {})
    assert feature_extraction.answer(bundle, []) == []


def test_text_without_a_token(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "last_hidden_state", {})
    save_tokenizer(tmp_path, special_tokens=False)
    with pytest.raises(InputError, match="text 2 of 3 has no token"):
        feature_extraction.answer(bundle, ["cat", " ", "dogs run"])


def test_graph_of_another_task(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "last_hidden_state", {})
    with pytest.raises(UnsupportedError, match="outputs last_hidden_state") as caught:
        text_classification.answer(bundle, ["cat"])
    assert "`logits`" in caught.value.hint
    bundle = make_bundle(tmp_path, "logits", {}, ("input_ids", "attention_mask", "seqlens_k"))
    with pytest.raises(UnsupportedError, match="inputs input_ids, attention_mask, seqlens_k"):
        text_classification.answer(bundle, ["cat"])
