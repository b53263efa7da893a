"""Objectives: their losses and metrics against PyTorch and transformers, their data, and what does not fit."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from llmfast import registry
from llmfast.cli import app
from llmfast.errors import InputError, OptionError, UnsafeInputError, UnsupportedError
from llmfast.export.checkpoint import load_config
from llmfast.export.module import export_module
from llmfast.export.stage import ExportOptions, export
from llmfast.infer.stage import answer
from llmfast.records import Records
from llmfast.tokenizer import Tokenizer
from llmfast.tune.adapters import add_adapters
from llmfast.tune.objective import Job
from llmfast.tune.objectives import classification
from llmfast.tune.options import TuneOptions
from llmfast.tune.student import CLASSIFIER_CLASS, load_model
from tests.tiny_encoder import save_encoder
from tests.tiny_tune import MODULE, TEXT, losses, run, weights, write_encoder, write_labelled, write_text

PAIRS = [(5.0, "the cat sat", "a cat sat"), (1.0, "two dogs run", "the mat"), (3.0, "a cat", "the cat by dogs"),
         (0.0, "on a mat", "dogs run"), (4.0, "two dogs", "dogs run by"), (2.0, "the mat", "sat on a mat")]  # fmt: skip


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def _vectors(folder: Path, texts: list[str]) -> torch.Tensor:
    """Return the mean of each text's token vectors, one text at a time."""
    tokenizer, model = Tokenizer.load(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.stack(
            [model(input_ids=torch.tensor([tokenizer.encode(text)])).last_hidden_state[0].mean(0) for text in texts]
        )


def test_a_sentence_encoder_becomes_a_classifier_that_infers(encoder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data.txt")
    tuned = run(encoder, tmp_path / "out", data, validation=data, batch_size=8, epochs=6, learning_rate=1e-2)
    assert tuned.figures["validations"][-1]["accuracy"] == 1.0
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "cats", "1": "dogs"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    bundle = export(str(tmp_path / "out"), tmp_path / "fp32")
    assert bundle.manifest.task == "text-classification"
    answers = answer(tmp_path / "fp32", ["the cat sat on a mat", "two dogs run by the mat"])
    assert [one["label"] for one in answers] == ["cats", "dogs"]


def test_the_loss_of_classification_is_cross_entropy(encoder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data.txt", rows=9)
    run(encoder, tmp_path / "head", data, validation=data, batch_size=4, max_steps=2)
    tuned = run(tmp_path / "head", tmp_path / "out", data, validation=data, batch_size=4, max_steps=1)
    tokenizer = Tokenizer.load(tmp_path / "head")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head").eval()
    lines = [line.split(" ", 1) for line in data.read_text(encoding="utf-8").splitlines()]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([tokenizer.encode(text.strip())])).logits[0] for _, text in lines]
    targets = torch.tensor([["cats", "dogs"].index(label) for label, _ in lines])
    wanted = torch.nn.functional.cross_entropy(torch.stack(logits), targets)
    first = tuned.figures["validations"][0]
    assert first["validation_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert first["accuracy"] == pytest.approx((torch.stack(logits).argmax(-1) == targets).float().mean().item())


def test_consistency_adds_what_two_answers_differ_by(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "bert", hidden_dropout_prob=0.3)
    data = write_labelled(tmp_path / "data.txt", rows=9)
    rows = [line.split(" ", 1) for line in data.read_text(encoding="utf-8").splitlines()]
    options = TuneOptions(data, validation=data, seq_len=16)
    torch.manual_seed(0)
    objective = classification.prepare(
        Job(encoder, options, encoder), classification.Options(label_smoothing=0.0, consistency=3.0)
    )
    assert len(objective.train) == len(rows)
    seen = []
    objective.model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits.detach().double()))
    objective.model.train()
    loss, predictions = objective.loss(objective.model, objective.train)
    first, second = (one.softmax(-1).numpy() for one in seen[0].chunk(2))
    assert not np.allclose(first, second)
    targets = [row.target for row in objective.train]
    likelihood = sum(-np.log(one[np.arange(9), targets]).sum() for one in (first, second)) / 2
    divergence = sum((a * np.log(a / b)).sum() for a, b in ((first, second), (second, first))) / 2
    assert loss.item() == pytest.approx(likelihood + 3 * divergence, rel=1e-5)
    assert predictions.tolist() == first.argmax(-1).tolist()
    objective.model.eval()
    objective.loss(objective.model, objective.train)
    assert len(seen[1]) == len(rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables_say_the_same_as_lines(encoder: Path, tmp_path: Path, kind: str) -> None:
    plain = write_labelled(tmp_path / "data.txt", rows=12)
    rows = [line.strip().split(" ", 1) for line in plain.read_text(encoding="utf-8").splitlines()]
    table = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(json.dumps({"review": text, "stars": label}) for label, text in rows), "utf-8")
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        lines = [separator.join(["id", "review", "stars"])]
        lines += [separator.join(["7", f'"{text}"' if kind == "csv" else text, label]) for label, text in rows]
        table.write_text("\n".join(lines), encoding="utf-8")
    options = {"batch_size": 4, "epochs": 1, "validation_split": 0}
    run(encoder, tmp_path / "plain", plain, **options)
    run(encoder, tmp_path / "table", table, **options, fields={"text": "review", "label": "stars"})
    assert losses(tmp_path / "plain") == losses(tmp_path / "table")


def test_quotes_and_commas_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('label,text\nx,"one, two\nthree"\ny,"say ""hi"""\n', encoding="utf-8")
    (tmp_path / "b.tsv").write_text('x\t"quoted at first\ny\tplain "here"\n', encoding="utf-8")
    assert [text for _, text in Records(tmp_path / "a.csv", "label", "text")] == [
        "one, two\nthree",
        'say "hi"',
    ]
    assert [text for _, text in Records(tmp_path / "b.tsv", "label", "text")] == [
        '"quoted at first',
        'plain "here"',
    ]


def test_labels_by_number_get_names(encoder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data.txt", names=("0", "1"))
    run(encoder, tmp_path / "out", data, labels=("bad", "good"), max_steps=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "bad", "1": "good"}
    # A classifier keeps its head and its names.
    run(tmp_path / "out", tmp_path / "again", data, max_steps=1, learning_rate=1e-9)
    assert json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))["id2label"]["1"] == "good"
    kept, before = weights(tmp_path / "again")["classifier.weight"], weights(tmp_path / "out")["classifier.weight"]
    torch.testing.assert_close(kept, before, atol=1e-6, rtol=0)


def test_labels_that_do_not_fit_are_named(encoder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data.txt")
    other = write_labelled(tmp_path / "other.txt", names=("cats", "birds"))
    with pytest.raises(InputError, match="line 2 has the label `birds`, which is none of cats, dogs"):
        run(encoder, tmp_path / "out", data, validation=other)
    run(encoder, tmp_path / "out", data, max_steps=1)
    with pytest.raises(InputError, match=r"the head of .* lacks") as caught:
        run(tmp_path / "out", tmp_path / "more", other)
    assert "--new-head" in caught.value.hint
    run(tmp_path / "out", tmp_path / "more", other, new_head=True, max_steps=1)
    config = json.loads((tmp_path / "more" / "config.json").read_text(encoding="utf-8"))
    assert sorted(config["id2label"].values()) == ["birds", "cats"]


def test_a_head_of_other_size_is_made_anew(encoder: Path, tmp_path: Path) -> None:
    run(encoder, tmp_path / "two", write_labelled(tmp_path / "a.txt"), max_steps=1)
    data = write_labelled(tmp_path / "b.txt", names=("x", "y", "z"))
    run(tmp_path / "two", tmp_path / "three", data, new_head=True, max_steps=1)
    assert weights(tmp_path / "three")["classifier.weight"].shape == (3, 32)


def test_a_multi_label_classifier_is_published_as_what_it_was_trained_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder(tmp_path / "multi", "bert", "AutoModelForSequenceClassification", num_labels=2, pad_token_id=0,
                 problem_type="multi_label_classification")  # fmt: skip
    data = write_labelled(tmp_path / "data.txt", names=("LABEL_0", "LABEL_1"))
    run(tmp_path / "multi", tmp_path / "out", data, max_steps=1)
    assert "is made for multi_label_classification" in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize(("kind", "whole"), [("deberta-v2", {"pooler", "classifier"}), ("bert", {"classifier"})])
def test_adapters_leave_a_new_head_whole(kind: str, whole: set[str], tmp_path: Path) -> None:
    save_encoder(tmp_path / kind, kind, pad_token_id=0)
    model = add_adapters(load_model(tmp_path / kind, CLASSIFIER_CLASS, load_config(tmp_path / kind), new_head=True), 4)
    trained = [name for name, one in model.named_parameters() if one.requires_grad and "lora_" not in name]
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in trained} == whole
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and name.split(".")[2] in whole]


def test_regression_moves_cosines_towards_scores(encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.tsv"
    data.write_text("\n".join(f"{score}\t{one}\t{two}" for score, one, two in PAIRS), encoding="utf-8")
    tuned = run(encoder, tmp_path / "out", data, objective="regression", validation=data, batch_size=6, epochs=30,
                learning_rate=3e-3)  # fmt: skip
    scores = np.array([score for score, _, _ in PAIRS])
    for line, folder in (
        (tuned.figures["validations"][0], encoder),
        (tuned.figures["validations"][-1], tmp_path / "out"),
    ):
        sides = [_vectors(folder, [pair[side] for pair in PAIRS]) for side in (1, 2)]
        cosines = torch.nn.functional.cosine_similarity(*sides).numpy()
        assert line["validation_loss"] == pytest.approx(float(np.mean((cosines - scores / 5) ** 2)), rel=1e-3)
        assert line["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-5)
    assert (
        tuned.figures["validations"][-1]["validation_loss"] < 0.5 * tuned.figures["validations"][0]["validation_loss"]
    )
    assert export(str(tmp_path / "out"), tmp_path / "fp32", ExportOptions("feature-extraction")).manifest.graphs


def _cross_encoder(folder: Path, **settings: Any) -> Path:
    save_encoder(folder, "bert", "AutoModelForSequenceClassification", num_labels=1, pad_token_id=0, **settings)
    return folder


@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_regression_of_a_classifier_trains_the_score_that_infer_gives(problem_type: str | None, tmp_path: Path) -> None:
    source = _cross_encoder(tmp_path / "cross", **({"problem_type": problem_type} if problem_type else {}))
    data = tmp_path / "pairs.csv"
    lines = ["sentence1,score,sentence2", *(f"{one},{score},{two}" for score, one, two in PAIRS)]
    data.write_text("\n".join(lines), encoding="utf-8")
    tuned = run(source, tmp_path / "out", data, objective="regression", validation=data, max_steps=30,
                learning_rate=1e-2)  # fmt: skip
    first, last = tuned.figures["validations"][0], tuned.figures["validations"][-1]
    assert last["validation_loss"] < 0.5 * first["validation_loss"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = Tokenizer.load(source).encode_batch([(one, two) for _, one, two in PAIRS], 64)
    with torch.no_grad():
        logits = model(**{name: torch.tensor(ids) for name, ids in batch.items()}).logits[:, 0].numpy()
    found = logits if problem_type else 1 / (1 + np.exp(-logits))
    targets = np.array([score / 5 for score, _, _ in PAIRS])
    assert last["validation_loss"] == pytest.approx(float(np.mean((found - targets) ** 2)), rel=1e-3)


def _distillation(student: Path, teacher: Path, temperature: float, hidden: float) -> float:
    """Compute the loss over all windows as its definition says."""
    ids = torch.tensor([*Tokenizer.load(student).encode(TEXT), 2])
    windows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in (student, teacher)]
    with torch.no_grad():
        ours, theirs = (model(input_ids=windows, output_hidden_states=True) for model in models)
    left, right = ((one.logits[:, :-1].double() / temperature).softmax(-1) for one in (ours, theirs))
    divergence = temperature**2 * (right * (right / left).log()).sum(-1).mean()
    pairs = [(0, 0), (1, 2)]  # one layer against two: embeddings, and the last states
    distances = [
        ((ours.hidden_states[i] - theirs.hidden_states[j]) ** 2).sum(-1) / (theirs.hidden_states[j] ** 2).sum(-1)
        for i, j in pairs
    ]
    return float(divergence + hidden * torch.stack(distances).mean())


def _drop_a_layer(source: Path, target: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = None
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    return target


def test_distillation_is_what_its_formula_says_and_repairs(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    teacher = checkpoints("llama-tied")
    student = _drop_a_layer(teacher, tmp_path / "student")
    text = write_text(tmp_path)
    settings = {"temperature": "2", "hidden_weight": "0.5"}
    tuned = run(student, tmp_path / "out", text, teacher=str(teacher), settings=settings, validation=text, seq_len=32,
                max_steps=60, learning_rate=3e-3)  # fmt: skip
    first, last = tuned.figures["validations"][0], tuned.figures["validations"][-1]
    assert tuned.figures["objective"] == "distillation"
    assert first["validation_loss"] == pytest.approx(_distillation(student, teacher, 2.0, 0.5), rel=1e-4)
    assert last["validation_loss"] == pytest.approx(_distillation(tmp_path / "out", teacher, 2.0, 0.5), rel=1e-3)
    assert last["validation_loss"] < 0.6 * first["validation_loss"]
    plain = run(student, tmp_path / "lm", text, objective="causal-lm", validation=text, seq_len=32, max_steps=1)
    assert first["perplexity"] == pytest.approx(plain.figures["validations"][0]["perplexity"], rel=1e-4)
    assert math.log(first["perplexity"]) == pytest.approx(plain.figures["validations"][0]["validation_loss"], rel=1e-5)


def test_sentence_encoders_and_classifiers_are_distilled(encoder: Path, tmp_path: Path) -> None:
    wide = write_encoder(tmp_path / "wide", hidden_size=64, num_attention_heads=8)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(text for _, one, two in PAIRS for text in (one, two)), encoding="utf-8")
    with pytest.raises(InputError, match=r"are 32 wide, those of the teacher .* 64"):
        run(encoder, tmp_path / "x", lines, teacher=str(wide), max_steps=1)
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    model = AutoModel.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(other)
    tuned = run(other, tmp_path / "near", lines, teacher=str(encoder), validation=lines, epochs=20, learning_rate=3e-3)
    wanted = torch.nn.functional.cosine_similarity(
        *(_vectors(folder, lines.read_text(encoding="utf-8").splitlines()) for folder in (other, encoder))
    )
    assert tuned.figures["validations"][0]["cosine"] == pytest.approx(wanted.mean().item(), abs=1e-5)
    assert tuned.figures["validations"][-1]["cosine"] > tuned.figures["validations"][0]["cosine"]
    data = write_labelled(tmp_path / "data.txt")
    run(encoder, tmp_path / "teacher", data, batch_size=8, epochs=6, learning_rate=1e-2)
    run(encoder, tmp_path / "student", data, max_steps=1)
    tuned = run(tmp_path / "student", tmp_path / "taught", data, teacher=str(tmp_path / "teacher"), validation=data,
                epochs=6, learning_rate=1e-2)  # fmt: skip
    assert tuned.figures["validations"][-1]["accuracy"] == 1.0


def test_a_teacher_that_speaks_of_other_things_is_refused(
    checkpoints: Callable[[str], Path], encoder: Path, tmp_path: Path
) -> None:
    text, student = write_text(tmp_path), checkpoints("llama-tied")
    other = tmp_path / "other"
    shutil.copytree(student, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = {
        f"{key}" if key != "ab" else "ba": i for key, i in tokenizer["model"]["vocab"].items()
    }
    tokenizer["model"]["merges"] = [["b", "a"]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match="have different vocabularies: other tokens"):
        run(student, tmp_path / "out", text, teacher=str(other))
    with pytest.raises(InputError, match="is a `BertModel`"):
        run(student, tmp_path / "out", text, teacher=str(encoder))
    with pytest.raises(OptionError, match="needs a --teacher"):
        run(student, tmp_path / "out", text, objective="distillation")
    with pytest.raises(OptionError, match="does not go with --objective causal-lm"):
        run(student, tmp_path / "out", text, objective="causal-lm", teacher=str(student))


def test_a_module_of_ones_own_is_trained_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(MODULE, encoding="utf-8")
    rows = [[(start + step) % 10 + 1 for step in range(3 + start % 4)] for start in range(40)]
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"ids": row[:-1], "labels": row[1:]}) for row in rows]
    data.write_text("\n".join(lines), encoding="utf-8")
    module = f"{tmp_path / 'net.py'}:factory"
    tuned = run(None, tmp_path / "out", data, module=module, validation=data, epochs=30, learning_rate=3e-2)
    assert "made" not in capsys.readouterr().out
    assert tuned.figures["validations"][-1]["accuracy"] == 1.0
    bundle = export_module(module, tmp_path / "fp32", ExportOptions(), tmp_path / "out" / "model.safetensors")
    assert [step.stage for step in bundle.manifest.lineage] == ["tune", "export"]
    once_more = run(None, tmp_path / "again", data, module=module, weights=tmp_path / "out" / "model.safetensors",
                    validation=data, max_steps=1)  # fmt: skip
    assert once_more.figures["validations"][0]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ids": [1, 2]}', "line 1 has no `labels`"),
        ('{"ids": ["a"], "labels": [1]}', "not lists of numbers"),
        ("[1]", "line 1 has no `ids`"),
        ("no", "line 1 is not JSON"),
        ('{"ids": [1, 2], "labels": [1, 2, 3]}', "do not fit the output"),
        ('{"ids": [99], "labels": [1]}', "`forward`"),
    ],
)
def test_rows_that_do_not_fit_a_module(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "net.py").write_text(MODULE, encoding="utf-8")
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{line}\n" * 3, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        run(None, tmp_path / "out", data, module=f"{tmp_path / 'net.py'}:factory", validation_split=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "no usable line in"),
        ("blank.txt", " \n\n", "no usable line in"),
        ("one.txt", "a cat\n" * 9, "a single label, `a`"),
        ("prose.txt", "".join(f"word{index} more text\n" for index in range(50)), "has 50 labels in 50 rows"),
        ("lone.txt", "label\n", "line 1"),
        ("latin.txt", b"a caf\xe9\n", "not UTF-8"),
        ("no.csv", "a,b,c\n1,2,3\n", "no column `label`"),
        ("header.csv", "label,text\n", "no usable line in"),
        ("ragged.csv", "label,text\nx,one,two\n", "line 2 has 3 columns, not 2"),
        ("hole.csv", "label,text\nx,\ny,z\n", "malformed line: .*line 2"),
        ("bad.jsonl", '{"label": "x", "text": "y"}\n{\n', "line 2"),
        ("list.jsonl", "[1, 2]\n", "malformed line: .*line 1"),
        ("few.txt", "a cat\n", "a single label|too little data"),
    ],
)
def test_data_that_is_none(encoder: Path, tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    data = tmp_path / name
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        run(encoder, tmp_path / "out", data)
    assert not list(tmp_path.glob("*out*"))


def test_checkpoints_that_cannot_be_trained(checkpoints: Callable[[str], Path], encoder: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(encoder, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(InputError, match="weights missing"):
        run(bare, tmp_path / "out", text)
    (bare / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsafeInputError, match="pickle"):
        run(bare, tmp_path / "out", text)
    with pytest.raises(UnsupportedError, match="does not predict the next token"):
        run(encoder, tmp_path / "out", text, objective="causal-lm")
    with pytest.raises(UnsupportedError, match="gives no score"):
        run(checkpoints("llama"), tmp_path / "out", text, objective="regression")
    with pytest.raises(InputError, match="not found"):
        run(tmp_path / "nowhere", tmp_path / "out", text)
    with pytest.raises(UnsupportedError, match="is a decoder"):
        run(checkpoints("llama"), tmp_path / "out", text, objective="classification")
    with pytest.raises(OptionError, match="--seq-len 100: the model takes 40 tokens"):
        run(encoder, tmp_path / "out", write_labelled(tmp_path / "data.txt"), seq_len=100)
    with pytest.raises(InputError, match="text too short"):
        run(checkpoints("llama"), tmp_path / "out", text, seq_len=100_000)


def test_the_command_prints_what_was_measured(encoder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data.txt")
    common = [
        "tune",
        str(encoder),
        "-o",
        str(tmp_path / "out"),
        "--data",
        str(data),
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    plan = CliRunner().invoke(app, [*common, "--dry-run"])
    assert "for classification" in plan.stdout
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*common, "--max-steps", "2", "--format", "json", "--set", "label_smoothing=0.1"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["steps"] == 2
    assert document["validations"][0]["step"] == 0
    assert {"tokens_per_s", "peak_memory_bytes", "trained_parameters"} <= set(document)
    assert CliRunner().invoke(app, common).exit_code == 8
    assert CliRunner().invoke(app, ["tune", str(encoder)]).exit_code == 2
    listed = CliRunner().invoke(app, ["tune", "--list"]).stdout
    assert all(name in listed for name in registry.names("tune.objectives"))


@pytest.mark.parametrize("name", registry.names("tune.objectives"))
def test_every_objective_says_what_it_is(name: str) -> None:
    plugin = registry.load("tune.objectives", name)
    assert plugin.__doc__
    assert "Data:" in plugin.__doc__
    assert plugin.DEFAULTS.learning_rate > 0
    registry.make_options(plugin, {})
