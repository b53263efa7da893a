"""lm-eval's tasks over llmfast's engine: scores and answers against PyTorch's, gates, and tasks that can't be had."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from llmfast.bench.document import read_schema
from llmfast.bench.harness.scoring import continuation_scores, continuations, read_settings
from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bench.table import print_document
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError, UnsafeInputError, UnsupportedError
from llmfast.infer.opening import open_decoder
from llmfast.tokenizer import Tokenizer
from llmfast.verdict import Gate

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "red", "birds", "near", "some", "old", "water"]

PICK = """
task: pick
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: options
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
REPLY = """
task: reply
dataset_path: json
dataset_kwargs: {data_files: {test: prompts.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: reply
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
READ = """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
BOTH = """
group: both
task: [pick, again]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
AGAIN = PICK.replace("task: pick", "task: again").replace("choices.jsonl", "few.jsonl")
UNSAFE = PICK.replace("task: pick", "task: unsafe\nunsafe_code: true")
LOST = PICK.replace("task: pick", "task: lost").replace("choices.jsonl", "gone.jsonl")
REMOTE = PICK.replace("task: pick", "task: remote").replace("dataset_path: json", "dataset_path: nobody/nothing")


def _lines(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tasks with their data beside them."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'llmfast[eval]'")
    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)

    def words(low: int, high: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(low, high)))

    choices = [
        {"question": words(4, 9), "options": [words(1, 4) for _ in range(3)], "answer": int(random.integers(3))}
        for _ in range(10)
    ]
    _lines(folder / "choices.jsonl", choices)
    _lines(folder / "few.jsonl", choices[:4])
    _lines(folder / "prompts.jsonl", [{"prompt": words(3, 6), "reply": "x"} for _ in range(3)])
    tasks = {"pick": PICK, "reply": REPLY, "read": READ, "both": BOTH, "again": AGAIN}
    for name, text in (tasks | {"unsafe": UNSAFE, "lost": LOST, "remote": REMOTE}).items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def reference(checkpoints: Any) -> Any:
    """Return what PyTorch says: (context tokens, continuation tokens) -> log p, is greedy."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied")).eval().double()

    def score(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, -len(continuation) :]
        wanted = ids[0, -len(continuation) :]
        total = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
        return float(total), bool((logits.argmax(-1) == wanted).all())

    score.model = model
    return score


def _run(bundles: list[Path], folder: Path, *names: str, **changed: Any) -> dict[str, Any]:
    settings = {"prompt_tokens": 8, "output_tokens": 4, "rounds": 1, "warmup": 0, "threads": 1, "tasks_dir": folder}
    return bench(bundles, BenchOptions(tasks=names, **(settings | changed))).document()


def test_scores_are_those_of_pytorch_whatever_the_cache_holds(fp32_bundle: Path, reference: Any) -> None:
    engine = open_decoder(ModelBundle.open(fp32_bundle), threads=1)
    random = np.random.default_rng(1)
    start = random.integers(3, 259, 300).tolist()  # longer than a chunk
    pairs = [(start, [5, 6]), (start, [5, 7, 8]), (start[:40], [9]), (start[:40], [9, 10]), ([3], [4])]
    found = continuation_scores(engine, pairs)
    for (score, is_greedy), (context, continuation) in zip(found, pairs, strict=True):
        expected = reference(context, continuation)
        assert score == pytest.approx(expected[0], rel=1e-5)
        assert is_greedy == expected[1]
    best = int(open_decoder(ModelBundle.open(fp32_bundle), threads=1).prefill(np.array([3, 4])).argmax())
    assert continuation_scores(engine, [([3, 4], [best])])[0][1]


def test_what_is_too_long_loses_its_beginning(fp32_bundle: Path, reference: Any) -> None:
    engine = open_decoder(ModelBundle.open(fp32_bundle), threads=1)
    ids = np.random.default_rng(2).integers(3, 259, engine.capacity + 20).tolist()
    [(score, _)] = continuation_scores(engine, [(ids[:-2], ids[-2:])])
    kept = ids[-engine.capacity - 1 :]
    assert score == pytest.approx(reference(kept[:-2], kept[-2:])[0], rel=1e-5)


def test_answers_are_those_of_transformers(fp32_bundle: Path, reference: Any) -> None:
    import torch

    tokenizer = Tokenizer.load(fp32_bundle)
    engine = open_decoder(ModelBundle.open(fp32_bundle), threads=1)
    prompts = [tokenizer.encode("the cat"), tokenizer.encode("two red birds")]
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    texts = continuations(engine, tokenizer, [(ids, settings) for ids in prompts])
    for ids, text in zip(prompts, texts, strict=True):
        whole = reference.model.generate(
            torch.tensor([ids]),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(tokenizer.vocab_size, 320)),  # padding of the embedding, never chosen here
        )
        expected = tokenizer.decode(whole[0, len(ids) :].tolist()).split("\n")[0]
        assert text == expected.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character at the limit is left out
    stop = texts[0][2:4]
    assert continuations(engine, tokenizer, [(prompts[0], settings | {"until": stop})]) == [texts[0].split(stop)[0]]


def test_settings_that_llmfast_lacks_are_refused() -> None:
    sampling, stop, most = read_settings(
        {"until": ["a", ""], "max_gen_toks": 5, "do_sample": True, "temperature": 0.5, "top_k": 3}
    )
    assert (sampling.temperature, sampling.top_k, stop, most) == (0.5, 3, ("a",), 5)
    with pytest.raises(UnsupportedError, match="num_beams: 4"):
        read_settings({"max_gen_toks": 5, "num_beams": 4})


def test_tasks_score_as_pytorch_does(
    fp32_bundle: Path, folder: Path, reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    document = _run(
        [fp32_bundle, fp32_bundle], folder, "pick", "reply", "read", max_drops=("acc=1", "reply.exact_match=0")
    )
    jsonschema.validate(document, read_schema())
    tokenizer = Tokenizer.load(fp32_bundle)
    rows = [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()]
    right, right_by_length = [], []
    total = words = 0.0
    for row in rows:
        context = tokenizer.encode(f"Question: {row['question']}\nAnswer:")
        scores = [reference(context, tokenizer.encode(f" {option}"))[0] for option in row["options"]]
        right.append(float(np.argmax(scores) == row["answer"]))
        lengths = [len(option) for option in row["options"]]
        right_by_length.append(float(np.argmax(np.divide(scores, lengths)) == row["answer"]))
        total += reference([tokenizer.eos_ids[0]], tokenizer.encode(row["question"]))[0]
        words += len(row["question"].split())
    for found in document["rows"]:
        assert found["samples"]["pick.acc"] == right
        assert found["pick.acc"] == pytest.approx(np.mean(right))
        assert found["pick.acc_norm"] == pytest.approx(np.mean(right_by_length))
        assert found["read.word_perplexity"] == pytest.approx(np.exp(-total / words), rel=1e-5)
        assert found["reply.exact_match"] == 0.0
    itself = document["rows"][1]
    assert itself["pick.acc_change"] == 0
    assert itself["verdict"]["pick.acc"] == "equal"
    assert {entry["figure"]: entry["verdict"] for entry in document["verdict"]} == {
        "pick.acc_change": "passed",
        "reply.exact_match_change": "passed",
    }
    assert document["settings"]["tasks"]["documents"] == {"pick": 10, "reply": 3, "read": 10}
    capsys.readouterr()
    print_document(document, "csv")
    assert "pick.acc_low" in capsys.readouterr().out
    print_document(document, "md")
    printed = capsys.readouterr().out
    assert "pick acc %" in printed
    assert "| read word_perplexity |" in printed
    assert f"{100 * np.mean(right):.1f}" in printed


def test_a_group_weighs_its_tasks_and_examples_are_the_same_for_all(fp32_bundle: Path, folder: Path) -> None:
    document = _run([fp32_bundle, fp32_bundle], folder, "both", num_fewshot=2, limit=6)
    for row in document["rows"]:
        assert row["both.acc"] == pytest.approx((6 * row["pick.acc"] + 4 * row["again.acc"]) / 10)
    assert document["rows"][0]["samples"]["both.acc"] == document["rows"][1]["samples"]["both.acc"]
    settings = document["settings"]["tasks"]
    assert settings["num_fewshot"] == {"pick": 2, "again": 2}
    assert settings["documents"] == {"pick": 6, "again": 4}
    shown = {figure["key"] for figure in settings["figures"] if figure["in_table"]}
    assert shown == {"both.acc"}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("pikc", OptionError, "`pikc`: no such task"),
        ("unsafe", UnsafeInputError, "runs what the model writes"),
        ("lost", InputError, r"gone\.jsonl"),
        ("remote", InputError, "needs `nobody/nothing`, which is not on this machine"),
    ],
)
def test_tasks_that_cannot_be_had_are_refused_before_anything_runs(
    fp32_bundle: Path, folder: Path, name: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        _run([fp32_bundle], folder, name)


def test_without_lm_eval_the_way_to_it_is_said(fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(UnsupportedError, match="lm-eval, which is not installed") as found:
        bench([fp32_bundle], BenchOptions(tasks=("pick",)))
    assert "llmfast[eval]" in found.value.hint


def test_options_of_tasks_want_tasks_and_gates_know_their_figures(fp32_bundle: Path, folder: Path) -> None:
    with pytest.raises(OptionError, match="--limit is for tasks"):
        BenchOptions(limit=3)
    with pytest.raises(OptionError, match="no quality of this run"):
        _run([fp32_bundle], folder, "pick", max_drops=("exact_match=1",))
    with pytest.raises(OptionError, match="does not measure"):
        _run([fp32_bundle], folder, "pick", gates=(Gate("read.word_perplexity", 1.0, "max"),))
