"""Classifiers of pairs of texts (NLI): answers against transformers' pipeline, figures of bench, and bad input."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from typer.testing import CliRunner

from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import OptionError
from llmfast.export.stage import export
from llmfast.tasks import text_classification
from tests.tiny_tasks import PIECES, SENTENCES, save_head

PAIRS = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[1], SENTENCES[3]), (SENTENCES[3], SENTENCES[2]), ("cat", "dog")]
LABELS = {0: "entailment", 1: "neutral", 2: "contradiction"}


@dataclass(frozen=True)
class Nli:
    """A classifier of pairs as transformers runs it, and its bundle."""

    pipeline: Callable[..., list[dict[str, Any]]]
    bundle: ModelBundle


@pytest.fixture(scope="module", params=["bert", "roberta"])
def nli(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Nli:
    folder = tmp_path_factory.mktemp("nli")
    auto_model, size = "AutoModelForSequenceClassification", len(PIECES)
    model = save_head(folder / "source", request.param, auto_model, vocab_size=size, id2label=LABELS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "source")
    if request.param == "roberta":  # which knows one type of tokens
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    pipeline = transformers.pipeline("text-classification", model, tokenizer=tokenizer, top_k=None)
    return Nli(pipeline, export(str(folder / "source"), folder / "bundle"))


def test_scores_equal_the_pipeline(nli: Nli) -> None:
    firsts, seconds = zip(*PAIRS, strict=True)
    answers = text_classification.answer(nli.bundle, firsts, text_pair=seconds)
    for (first, second), one in zip(PAIRS, answers, strict=True):
        expected = nli.pipeline({"text": first, "text_pair": second}, truncation=True)
        named = {label["label"]: label["score"] for label in expected}
        assert (one["text"], one["text_pair"]) == (first, second)
        assert one["label"] == expected[0]["label"]
        assert list(one["scores"]) == list(LABELS.values())
        np.testing.assert_allclose(list(one["scores"].values()), [named[key] for key in one["scores"]], rtol=1e-3)
    alone = text_classification.answer(nli.bundle, firsts)
    assert all(one["scores"] != other["scores"] for one, other in zip(alone, answers, strict=True))


def test_infer_takes_a_second_text_for_each_or_for_all(nli: Nli) -> None:
    arguments = ["infer", str(nli.bundle.path), "-p", "the cat", "-p", "a dog", "--format", "json", "--text-pair", "on"]
    for more, seconds in (([], ["on", "on"]), (["--text-pair", "in"], ["on", "in"])):
        answers = json.loads(CliRunner().invoke(app, [*arguments, *more]).stdout)
        assert [one["text_pair"] for one in answers] == seconds
        assert answers == text_classification.answer(nli.bundle, ["the cat", "a dog"], text_pair=seconds)


def test_number_of_second_texts_that_fits_nothing(nli: Nli) -> None:
    with pytest.raises(OptionError, match="2 second texts for 3 first ones"):
        text_classification.answer(nli.bundle, ["a", "b", "c"], text_pair=["d", "e"])


def test_bench_counts_right_pairs(nli: Nli, tmp_path: Path) -> None:
    firsts, seconds = zip(*PAIRS[:3], strict=True)
    answers = text_classification.answer(nli.bundle, firsts, text_pair=seconds)
    wrong = next(label for label in LABELS.values() if label != answers[2]["label"])
    labels = [answers[0]["label"], answers[1]["label"], wrong]
    data = tmp_path / "pairs.txt"
    data.write_text("".join(f"{label} {one}\t{two}\n" for label, (one, two) in zip(labels, PAIRS[:3], strict=True)))
    [row] = bench([nli.bundle.path], BenchOptions(rounds=1, warmup=0, shapes="1x8", data=data)).document()["rows"]
    np.testing.assert_allclose(row["accuracy"], 2 / 3)
