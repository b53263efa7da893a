"""Tasks of text encoders: the graphs against PyTorch, the answers against transformers' pipelines and plain loops."""

import functools
import inspect
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from typer.main import get_command
from typer.testing import CliRunner

from llmfast import registry
from llmfast.bench.metrics import answers, token_labels
from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject, Trial
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.export.ranking import read_activation
from llmfast.export.stage import ExportOptions, export
from llmfast.export.traced import detect_task
from llmfast.infer.stage import text_option
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.tasks import fill_mask, question_answering, text_ranking, token_classification
from llmfast.tokenizer import Tokenizer
from tests.tiny_tasks import LABELS, PIECES, SENTENCES, save_head, save_word_pieces

FAMILIES = ("albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")
HEADS = {
    "token-classification": {"id2label": dict(enumerate(LABELS))},
    "question-answering": {},
    "fill-mask": {},
    "text-ranking": {"num_labels": 1},
}
TASKS = tuple(HEADS)
QUESTION = "Where is the cat?"
CONTEXT = " ".join(SENTENCES) + " The dog sat in Berlin."


@dataclass(frozen=True)
class Head:
    """A checkpoint as PyTorch has it, and its bundle."""

    model: Any
    source: Path
    bundle: ModelBundle

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers reads it."""
        return transformers.AutoTokenizer.from_pretrained(self.source)

    def logits(self, *texts: str, name: str = "logits") -> np.ndarray:
        """PyTorch's output for a text or a pair, float64."""
        encoded = self.tokenizer(*texts, return_tensors="pt", truncation=True)
        inputs = self.bundle.manifest.graphs["model"]["inputs"]  # RoBERTa's kin knows one type of token
        with torch.no_grad():
            return self.model(**{key: encoded[key] for key in inputs})[name][0].double().numpy()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Head]:
    """Return a function that exports a family's head for a task, once; do not change the files."""

    @functools.cache
    def get(task: str, model_type: str = "bert") -> Head:
        folder = tmp_path_factory.mktemp("head")
        auto_model = registry.load("tasks", task).AUTO_MODEL
        model = save_head(folder / "source", model_type, auto_model, vocab_size=len(PIECES), **HEADS[task])
        return Head(model, folder / "source", export(str(folder / "source"), folder / "bundle"))

    return get


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_head_equals_pytorch_at_other_shapes(heads: Callable[..., Head], task: str, model_type: str) -> None:
    head = heads(task, model_type)
    assert head.bundle.manifest.task == task
    session = onnxruntime.InferenceSession(head.bundle.model, providers=["CPUExecutionProvider"])
    inputs, outputs = ([value.name for value in some] for some in (session.get_inputs(), session.get_outputs()))
    assert tuple(outputs) == registry.load("tasks", task).OUTPUTS
    for batch, length in ((1, 3), (3, 5), (2, 29)):
        rng = np.random.default_rng(batch)
        mask = np.ones((batch, length), np.int64)
        mask[-1, (length + 1) // 2 :] = 0
        feeds = {
            "input_ids": rng.integers(5, len(PIECES), (batch, length)),
            "attention_mask": mask,
            "token_type_ids": rng.integers(0, 2, (batch, length)),
        }
        feeds = {name: feeds[name] for name in inputs}
        with torch.no_grad():
            expected = head.model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        for name, actual in zip(outputs, session.run(outputs, feeds), strict=True):
            np.testing.assert_allclose(actual, expected[name].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_entities_equal_the_pipeline(heads: Callable[..., Head], model_type: str) -> None:
    head = heads("token-classification", model_type)
    pipeline = transformers.pipeline(
        "token-classification", head.model, tokenizer=head.tokenizer, aggregation_strategy="simple", stride=7
    )
    texts = [*SENTENCES, CONTEXT]
    found = token_classification.answer(head.bundle, texts)
    assert [one["text"] for one in found] == texts
    assert sum(len(one["entities"]) for one in found) > 10
    for text, one in zip(texts, found, strict=True):
        expected = pipeline(text)
        spans = [(span["entity_group"], span["start"], span["end"]) for span in expected]
        assert [(span["label"], span["start"], span["end"]) for span in one["entities"]] == spans
        scores = [span["score"] for span in expected]
        np.testing.assert_allclose([span["score"] for span in one["entities"]], scores, rtol=1e-4)
        assert [span["word"] for span in one["entities"]] == [text[start:end] for _, start, end in spans]


class Window:
    """An encoding of words that stand apart by one character."""

    def __init__(self, *lengths: int) -> None:
        ends = np.cumsum(np.array(lengths) + 1) - 1
        self.offsets = [(int(end) - length, int(end)) for length, end in zip(lengths, ends, strict=True)]
        self.special_tokens_mask = [0] * len(lengths)


@pytest.mark.parametrize(
    ("labels", "tags", "spans"),
    [
        (LABELS, ["B-PER", "I-PER", "O", "B-PER", "B-PER"], ["PER 0-3", "PER 6-7", "PER 8-9"]),
        (LABELS, ["I-PER", "I-LOC", "I-LOC", "O", "I-LOC"], ["PER 0-1", "LOC 2-5", "LOC 8-9"]),
        (
            ["O", "B-X", "I-X", "L-X", "U-X"],
            ["B-X", "I-X", "L-X", "U-X", "U-X"],
            ["X 0-5", "X 6-7", "X 8-9"],
        ),
        (["O", "B-X", "I-X", "E-X", "S-X"], ["B-X", "E-X", "S-X", "O", "S-X"], ["X 0-3", "X 4-5", "X 8-9"]),
        # No tags: a hyphen is part of the name.
        (["O", "S-BAR", "E-MAIL"], ["S-BAR", "S-BAR", "E-MAIL", "O", "O"], ["S-BAR 0-3", "E-MAIL 4-5"]),
    ],
)
def test_schemes_of_tags(labels: list[str], tags: list[str], spans: list[str]) -> None:
    logits = np.stack([np.eye(len(labels))[labels.index(tag)] * 9 for tag in tags]).astype(np.float32)
    found = token_classification._label_tokens(Window(1, 1, 1, 1, 1), logits, labels)
    assert [f"{span['label']} {span['start']}-{span['end']}" for span in found] == spans


def test_space_that_a_tokenizer_counts_to_a_word_is_left_out() -> None:
    found = token_classification._find("in  Rome ", [[{"label": "LOC", "score": 1.0, "start": 2, "end": 9}]])
    assert [(one["start"], one["end"], one["word"]) for one in found] == [(4, 8, "Rome")]


def test_labels_without_names(heads: Callable[..., Head]) -> None:
    bundle = heads("token-classification").bundle
    manifest = replace(bundle.manifest, architecture={"context_length": 40})
    [found] = token_classification.answer(replace(bundle, manifest=manifest), SENTENCES[:1])
    assert {span["label"] for span in found["entities"]} <= {f"LABEL_{index}" for index in range(len(LABELS))}
    assert found["entities"]


def best_span(head: Head, question: str, context: str, max_tokens: int) -> tuple[str, float, float]:
    """Return answer, score and the empty answer's score, with loops over all spans of tokens of all windows."""
    encoded = head.tokenizer(
        question, context, truncation="only_second", max_length=30, stride=15, return_overflowing_tokens=True
    )
    scores: dict[str, float] = {}
    no_answer = 1.0
    for number, ids in enumerate(encoded["input_ids"]):
        with torch.no_grad():
            types = {"token_type_ids": torch.tensor([encoded["token_type_ids"][number]])}
            types = types if "token_type_ids" in head.bundle.manifest.graphs["model"]["inputs"] else {}
            output = head.model(torch.tensor([ids]), **types)
        starts, ends = (np.exp(output[f"{name}_logits"][0].double().numpy()) for name in ("start", "end"))
        inside = [index for index, part in enumerate(encoded.sequence_ids(number)) if part == 1]
        starts, ends = (powers / powers[[0, *inside]].sum() for powers in (starts, ends))
        no_answer = min(no_answer, starts[0] * ends[0])
        spans = sorted(
            ((starts[i] * ends[j], i, j) for i in inside for j in inside if i <= j < i + max_tokens), reverse=True
        )
        for score, first, last in spans[:12]:
            words = (encoded.token_to_word(number, token) for token in (first, last))
            begin, end = (encoded.word_to_chars(number, word, sequence_index=1) for word in words)
            text = context[begin.start : end.end].lower()
            scores[text] = scores.get(text, 0) + score
    return *max(scores.items(), key=lambda pair: pair[1]), no_answer


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_answer_equals_plain_loops(heads: Callable[..., Head], model_type: str) -> None:
    head = heads("question-answering", model_type)
    texts = [*SENTENCES, CONTEXT]  # the last takes several windows
    for max_tokens in (1, 3, 15):
        found = question_answering.answer(head.bundle, texts, question=QUESTION, max_tokens=max_tokens)
        either = question_answering.answer(
            head.bundle, texts, question=QUESTION, max_tokens=max_tokens, allow_no_answer=True
        )
        for text, one, other in zip(texts, found, either, strict=True):
            answer, score, no_answer = best_span(head, QUESTION, text, max_tokens)
            assert (one["answer"].lower(), one["text"]) == (answer, text)
            assert one["score"] == pytest.approx(score, rel=1e-4)
            assert one["answer"] == text[one["start"] : one["end"]]
            assert other["score"] == pytest.approx(max(score, no_answer), rel=1e-4)
            assert other["answer"] == (one["answer"] if score > no_answer else "")


def test_no_answer_wins_where_it_is_likelier(heads: Callable[..., Head], monkeypatch: pytest.MonkeyPatch) -> None:
    def score(session: Any, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        logits = np.zeros(batch["input_ids"].shape, np.float32)
        logits[:, 0] = 9
        return [logits, logits]

    monkeypatch.setattr(question_answering, "score_positions", score)
    bundle = heads("question-answering").bundle
    [found] = question_answering.answer(bundle, SENTENCES[:1], question=QUESTION, allow_no_answer=True)
    assert (found["answer"], found["start"], found["end"]) == ("", 0, 0)
    assert found["score"] > 0.9
    assert "(no answer)" in question_answering.spell(found)
    [found] = question_answering.answer(bundle, SENTENCES[:1], question=QUESTION)
    assert found["answer"]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("text", ["The cat sat on a [MASK] .", "[MASK] [MASK] in Paris is [MASK]"])
def test_filled_masks_equal_the_pipeline(heads: Callable[..., Head], model_type: str, text: str) -> None:
    head = heads("fill-mask", model_type)
    expected = transformers.pipeline("fill-mask", head.model, tokenizer=head.tokenizer)(text, top_k=4)
    [found] = fill_mask.answer(head.bundle, [text], top_k=4)
    expected = expected if text.count("[MASK]") > 1 else [expected]
    assert len(found["masks"]) == text.count("[MASK]")
    for ours, theirs in zip(found["masks"], expected, strict=True):
        for key, name in (("token_id", "token"), ("token", "token_str")):
            assert [one[key] for one in ours] == [one[name] for one in theirs]
        if text.count("[MASK]") == 1:
            assert [one["sequence"] for one in ours] == [one["sequence"] for one in theirs]
        np.testing.assert_allclose([one["score"] for one in ours], [one["score"] for one in theirs], rtol=1e-4)


def test_gaps_are_filled_each_on_its_own(heads: Callable[..., Head]) -> None:
    [found] = fill_mask.answer(heads("fill-mask").bundle, ["The [MASK] sat [MASK] ."], top_k=1)
    (first,), (second,) = found["masks"]
    assert second["sequence"] == " ".join(["the [MASK] sat", second["token"], "."]).replace(" ##", "").replace(
        " .", "."
    )
    assert first["sequence"].endswith("sat [MASK].")
    assert fill_mask.spell(found).splitlines()[1].startswith("gap 2: ")


def test_head_of_a_language_model_shares_its_table(heads: Callable[..., Head]) -> None:
    proto = onnx.load(heads("fill-mask").bundle.model)
    tables = [tensor for tensor in proto.graph.initializer if len(PIECES) in tensor.dims and len(tensor.dims) == 2]
    assert [(table.name, list(table.dims)) for table in tables] == [
        ("bert.embeddings.word_embeddings.weight", [len(PIECES), 32])
    ]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2"])
def test_ranks_equal_pytorch_pair_by_pair(heads: Callable[..., Head], model_type: str) -> None:
    head = heads("text-ranking", model_type)
    documents = [*SENTENCES, CONTEXT]  # the last is cut, as are both texts where both are long
    for query in (QUESTION, CONTEXT):
        logits = [head.logits(query, document)[0] for document in documents]
        found = text_ranking.answer(head.bundle, documents, query=query)
        assert [one["index"] for one in found] == list(np.argsort(np.negative(logits), kind="stable"))
        for one in found:
            assert one["text"] == documents[one["index"]]
            assert one["score"] == pytest.approx(1 / (1 + np.exp(-logits[one["index"]])), rel=1e-4)
    assert text_ranking.answer(head.bundle, documents, query=CONTEXT, top_k=2) == found[:2]


def test_ranks_by_logits_where_the_checkpoint_says_so(heads: Callable[..., Head]) -> None:
    head = heads("text-ranking")
    manifest = replace(
        head.bundle.manifest, architecture={**head.bundle.manifest.architecture, "activation": "identity"}
    )
    [found] = text_ranking.answer(replace(head.bundle, manifest=manifest), SENTENCES[:1], query=QUESTION)
    assert found["score"] == pytest.approx(head.logits(QUESTION, SENTENCES[0])[0], rel=1e-4)


@pytest.mark.parametrize(
    ("config", "files", "task"),
    [
        ({"id2label": {"0": "LABEL_0"}}, {}, "text-ranking"),
        ({"id2label": {"0": "LABEL_0"}, "problem_type": "regression"}, {}, "text-classification"),
        ({"id2label": {"0": "toxic"}}, {}, "text-classification"),
        ({}, {}, "text-classification"),
        ({"id2label": {"0": "x"}, "sbert_ce_default_activation_function": "torch.nn.Identity"}, {}, "text-ranking"),
        ({"id2label": {"0": "x"}, "sentence_transformers": {"activation_fn": "torch.Sigmoid"}}, {}, "text-ranking"),
        (
            {"id2label": {"0": "LABEL_0"}},
            {"modules.json": "[{}]", "config_sentence_transformers.json": '{"model_type": "CrossEncoder"}'},
            "text-ranking",
        ),
        (
            {"id2label": {"0": "no", "1": "yes"}},
            {"modules.json": "[{}]", "config_sentence_transformers.json": '{"model_type": "CrossEncoder"}'},
            "text-classification",
        ),
        ({"id2label": {"0": "LABEL_0"}}, {"modules.json": "[{}]"}, "feature-extraction"),
    ],
)
def test_cross_encoders_are_known(tmp_path: Path, config: dict[str, Any], files: dict[str, str], task: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert detect_task({"architectures": ["BertForSequenceClassification"]} | config, tmp_path) == task


def test_activation_of_a_cross_encoder(tmp_path: Path) -> None:
    one = {"id2label": {"0": "LABEL_0"}}
    assert read_activation(tmp_path, one) == "sigmoid"
    identity = "torch.nn.modules.linear.Identity"
    assert read_activation(tmp_path, one | {"sentence_transformers": {"activation_fn": identity}}) == "identity"
    assert read_activation(tmp_path, one | {"sbert_ce_default_activation_function": identity}) == "identity"
    with pytest.raises(UnsupportedError, match=r"`torch.nn.Tanh`"):
        read_activation(tmp_path, one | {"sbert_ce_default_activation_function": "torch.nn.Tanh"})
    with pytest.raises(UnsupportedError, match="gives 2 scores"):
        read_activation(tmp_path, {"id2label": {"0": "no", "1": "yes"}})
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": identity}))
    assert read_activation(tmp_path, one) == "identity"
    (tmp_path / "modules.json").write_text("[{}, {}]")
    with pytest.raises(UnsupportedError, match="modules beside"):
        read_activation(tmp_path, one)


def test_a_classifier_of_several_labels_is_no_ranker(tmp_path: Path) -> None:
    save_head(tmp_path / "source", "bert", "AutoModelForSequenceClassification", num_labels=3)
    with pytest.raises(UnsupportedError, match="gives 3 scores") as caught:
        export(str(tmp_path / "source"), tmp_path / "bundle", ExportOptions(task="text-ranking"))
    assert "--task text-classification" in caught.value.hint
    assert not (tmp_path / "bundle").exists()


def test_tokenizer_that_cuts_before_the_model_must(heads: Callable[..., Head]) -> None:
    assert heads("text-ranking").bundle.manifest.architecture["max_seq_length"] == 30


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("task", TASKS)
def test_quantized_models_still_answer(heads: Callable[..., Head], tmp_path: Path, task: str, scheme: str) -> None:
    bundle = quantize(heads(task).bundle.path, tmp_path / scheme, QuantizeOptions(scheme))
    options = {"question-answering": {"question": QUESTION}, "text-ranking": {"query": QUESTION}}.get(task, {})
    texts = ["[MASK] " + text for text in SENTENCES]
    plugin = registry.load("tasks", task)
    found = plugin.answer(bundle, texts, **options)
    assert sorted(one["text"] for one in found) == sorted(texts)
    assert all(plugin.spell(one) for one in found)
    json.dumps(found, allow_nan=False)


def test_mistakes_in_masks(heads: Callable[..., Head], tmp_path: Path) -> None:
    bundle = heads("fill-mask").bundle
    with pytest.raises(InputError, match=r"no `\[MASK\]` in text 2 of 2") as caught:
        fill_mask.answer(bundle, ["the [MASK]", "the <mask>"])
    assert "write [MASK]" in caught.value.hint
    with pytest.raises(InputError, match=r"`\[MASK\]` of text 1 of 1 lies beyond the 30 tokens"):
        fill_mask.answer(bundle, [CONTEXT + " [MASK]"])
    with pytest.raises(OptionError, match="--top-k 0"):
        fill_mask.answer(bundle, ["[MASK]"], top_k=0)
    save_word_pieces(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"mask_token": None}))
    with pytest.raises(UnsupportedError, match="no mask token"):
        fill_mask.answer(replace(bundle, path=tmp_path), ["[MASK]"])


def test_mistakes_in_questions(heads: Callable[..., Head]) -> None:
    bundle = heads("question-answering").bundle
    with pytest.raises(InputError, match="context 2 of 2 is empty"):
        question_answering.answer(bundle, ["the cat", " \n"], question=QUESTION)
    with pytest.raises(OptionError, match="no question"):
        question_answering.answer(bundle, ["the cat"])
    with pytest.raises(OptionError, match="--max-tokens 0"):
        question_answering.answer(bundle, ["the cat"], question=QUESTION, max_tokens=0)
    with pytest.raises(InputError, match="the question alone fills the 30 tokens"):
        question_answering.answer(bundle, ["the cat"], question="cat " * 40)
    # Room for a single token of the context: still an answer, and no panic of the tokenizer.
    longest = question_answering.answer(bundle, ["the cat sat"], question="cat " * 26, max_tokens=3)
    assert longest[0]["answer"] in ("the", "cat", "sat")


def test_mistakes_in_ranking(heads: Callable[..., Head]) -> None:
    bundle = heads("text-ranking").bundle
    with pytest.raises(OptionError, match="no query"):
        text_ranking.answer(bundle, ["the cat"])
    with pytest.raises(OptionError, match="--top-k -1"):
        text_ranking.answer(bundle, ["the cat"], query=QUESTION, top_k=-1)
    with pytest.raises(InputError, match="document 2 of 2 is empty"):
        text_ranking.answer(bundle, ["the cat", ""], query=QUESTION)
    wrong = replace(bundle, model=heads("token-classification").bundle.model)
    with pytest.raises(UnsupportedError, match="not a re-ranker"):
        text_ranking.answer(wrong, ["the cat"], query=QUESTION)


def test_windows_of_tokens_repeat_as_asked(heads: Callable[..., Head]) -> None:
    tokenizer = Tokenizer.load(heads("fill-mask").source)
    [windows] = tokenizer.encode_windows([CONTEXT], 12, stride=4)
    ids = [window.ids[1:-1] for window in windows]
    assert all(before[-4:] == after[:4] for before, after in itertools.pairwise(ids))
    assert sum((part[4:] for part in ids[1:]), ids[0]) == tokenizer.encode(CONTEXT, add_special_tokens=False)
    with pytest.raises(InputError, match="does not fit 8 tokens"):
        tokenizer.encode_windows([("cat " * 9, "dog")], 8, strategy="only_second")
    assert len(tokenizer.encode_windows(["cat dog cat"], 3, stride=5)[0]) == 3


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


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_infer_of_every_task_on_the_command_line(heads: Callable[..., Head], tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(SENTENCES))
    ner, qa, bert, ranker = (heads(task).bundle.path for task in TASKS)
    for arguments, keys in (
        ([ner, "-p", SENTENCES[0]], {"entities"}),
        (
            [qa, "--question", QUESTION, "--context", CONTEXT, "--allow-no-answer", "--max-tokens", 3],
            {"answer", "score"},
        ),
        ([bert, "-p", "the [MASK] sat", "--top-k", 2], {"masks"}),
        ([ranker, "--query", QUESTION, "--document", SENTENCES[0]], {"index", "score"}),
    ):
        result = run("infer", *arguments, "--format", "json")
        assert result.exit_code == 0, result.output
        assert keys <= set(json.loads(result.stdout))
        assert run("infer", *arguments).stdout.strip()
    result = run("infer", ranker, "--query", QUESTION, "--input", file, "--format", "jsonl")
    ranks = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(one["text"] for one in ranks) == sorted(SENTENCES)
    assert [one["score"] for one in ranks] == sorted((one["score"] for one in ranks), reverse=True)
    assert len(run("infer", ranker, "--query", QUESTION, "--input", file, "--top-k", 2).stdout.splitlines()) == 2
    result = run("infer", ner, "-p", SENTENCES[0], "-p", SENTENCES[2], "--format", "json")
    assert [one["text"] for one in json.loads(result.stdout)] == [SENTENCES[0], SENTENCES[2]]


def test_embeddings_on_the_command_line(tmp_path: Path) -> None:
    save_head(tmp_path / "source", "bert", "AutoModel", vocab_size=len(PIECES))
    bundle, vectors = export(str(tmp_path / "source"), tmp_path / "bundle").path, tmp_path / "vectors.npy"
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(SENTENCES))
    result = run("infer", bundle, "--input", file, "--format", "jsonl")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    embeddings = np.array([one["embedding"] for one in found])
    cosines = embeddings @ embeddings[0] / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(embeddings[0])
    np.testing.assert_allclose([one["cosine"] for one in found], cosines, rtol=1e-6)
    lines = run("infer", bundle, "-p", SENTENCES[0], "-p", SENTENCES[1]).stdout.splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == ["1.0000", f"{cosines[1]:.4f}"]
    result = run("infer", bundle, "--input", file, "-o", vectors)
    assert result.exit_code == 0, result.output
    assert "vectors.npy: 4 embeddings of 32 numbers" in result.stderr
    saved = np.load(vectors)
    assert saved.dtype == np.float32
    np.testing.assert_allclose(saved, embeddings, rtol=1e-6)
    before = vectors.read_bytes()
    for more, code, words in (
        (["-o", vectors], 8, "output exists"),
        (["-o", tmp_path / "vectors.txt"], 2, "not a .npy file"),
        (["-o", tmp_path / "none" / "vectors.npy"], 6, "cannot write"),
        (["-o", tmp_path, "--overwrite"], 2, "not a .npy file"),
        (["--overwrite"], 2, "--overwrite without --output"),
    ):
        result = run("infer", bundle, "-p", "cat", *more)
        assert (result.exit_code, words in result.stderr) == (code, True), result.output
    assert vectors.read_bytes() == before
    assert run("infer", bundle, "-p", "cat", "-o", vectors, "--overwrite").exit_code == 0
    assert np.load(vectors).shape == (1, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "source", "texts.txt", "vectors.npy"]


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("fill-mask", ["-p", "[MASK]", "--question", "who"], ["--question is for question-answering", "for fill-mask"]),
        ("question-answering", ["-p", "the cat"], ["--prompt is for ", "is for question-answering"]),
        ("question-answering", ["--question", "who"], ["no text to run on", "--context TEXT"]),
        ("question-answering", ["--context", "the cat"], ["no question"]),
        ("text-ranking", ["--document", "the cat"], ["no query"]),
        ("text-ranking", ["--query", "cat"], ["--document TEXT"]),
        ("text-ranking", ["--query", "cat", "--document", "a", "--input", "x"], ["exclude each other"]),
        ("token-classification", ["-p", "cat", "-o", "x.npy"], ["--output is for feature-extraction"]),
        ("token-classification", ["-p", "cat", "--temperature", "1"], ["--temperature is for text-generation"]),
    ],
)
def test_options_that_do_not_fit(heads: Callable[..., Head], task: str, arguments: list[str], words: list[str]) -> None:
    result = run("infer", heads(task).bundle.path, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("name", registry.names("tasks"))
def test_task_honours_the_contract(name: str) -> None:
    plugin = registry.load("tasks", name)
    assert plugin.__doc__
    assert plugin.OUTPUTS
    assert hasattr(transformers, plugin.AUTO_MODEL)
    parameters = inspect.signature(plugin.answer).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert takes_any or set(plugin.INFER_OPTIONS) <= set(parameters)
    known = {parameter.name for parameter in get_command(app).commands["infer"].params}
    assert {*plugin.INFER_OPTIONS, text_option(name)} <= known
