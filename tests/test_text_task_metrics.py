"""Tasks of text encoders in `bench`: what moved beside another model, and data of another form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfast import registry
from llmfast.bench.metrics import answers, token_labels
from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject, Trial
from llmfast.errors import InputError
from tests.tiny_tasks import PIECES, QUESTION, SENTENCES, Head

DATA = {
    "token-classification": SENTENCES,
    "fill-mask": [f"[MASK] {text}" for text in SENTENCES],
    "question-answering": [f"{QUESTION}\t{text}\tBerlin" for text in SENTENCES],
    "text-ranking": [f"{QUESTION}\t{text}" for text in SENTENCES],
}


@pytest.mark.parametrize(
    ("task", "name", "same"),
    [
        ("token-classification", "token_labels", {"flipped_tokens": 0.0}),
        ("fill-mask", "token_labels", {"flipped_tokens": 0.0}),
        ("question-answering", "answers", {"changed_answers": 0.0}),
        ("text-ranking", "ranking", {"rank_correlation": pytest.approx(1.0)}),
    ],
)
def test_metric_of_a_task(
    heads: Callable[..., Head], tmp_path: Path, task: str, name: str, same: dict[str, Any]
) -> None:
    metric = registry.load("bench.metrics", name.replace("_", "-"))
    assert task in metric.TASKS
    fp32 = heads(task).bundle
    data = tmp_path / "data.txt"
    data.write_text("\n".join(DATA[task]))
    subject = Subject(fp32.path, threads=1)
    other = Subject(heads(task, "electra").bundle.path, threads=1)
    same_rows, other_rows = [], []
    for item in metric.prepare(fp32, data, BenchOptions()):
        reference = metric.answer(subject, item)
        same_rows.append(metric.compare(item, reference, reference))
        other_rows.append(metric.compare(item, metric.answer(other, item), reference))
    found, moved = (metric.figures(np.concatenate(rows)) for rows in (same_rows, other_rows))
    assert sum(map(len, same_rows)) == len(SENTENCES)
    assert {key: found[key] for key in same} == same
    assert all(moved[key] != value for key, value in same.items())
    trial = Trial((0, 0), len(PIECES), {"1x4": (1, 4)})
    assert registry.load("bench.metrics", "latency").measure(subject, trial)["latency_s_1x4"] > 0


def test_flipped_tokens_are_counted_per_text() -> None:
    ours, theirs = np.array([[0, 1], [0, 2], [1, 1]]), np.array([[0, 1], [0, 3], [1, 1]])
    rows = token_labels.compare(("", "", ""), ours, theirs)
    assert rows.tolist() == [[2, 1], [1, 0], [0, 0]]
    assert token_labels.figures(rows) == {"flipped_tokens": pytest.approx(1 / 3)}
    assert np.isnan(token_labels.figures(token_labels.compare(("", ""), ours[:1], theirs))["flipped_tokens"])


def test_answers_count_as_squad_counts_them() -> None:
    item = answers.Question("", "", ("The cat.", "a dog"))
    rows = [answers.compare(item, np.array([found]), np.array(["cat"])) for found in ("Cat", "dog", "the", "")]
    assert np.concatenate(rows).tolist() == [[1, 0], [1, 1], [0, 1], [0, 1]]
    assert answers.figures(np.concatenate(rows)) == {"exact_match": 0.5, "changed_answers": 0.75}
    unknown = answers.compare(answers.Question("", "", ()), np.array(["cat"]), np.array(["cat"]))
    assert answers.figures(unknown) == {"exact_match": None, "changed_answers": 0.0}


def test_data_of_another_form(heads: Callable[..., Head], tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("no tab and no mask\n")
    for name, task, words in (
        ("token-labels", "fill-mask", r"no `\[MASK\]` in the line"),
        ("answers", "question-answering", "line 1"),
        ("ranking", "text-ranking", "line 1"),
    ):
        with pytest.raises(InputError, match=words):
            registry.load("bench.metrics", name).prepare(heads(task).bundle, data, BenchOptions())
