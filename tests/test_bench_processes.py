"""llmfast bench on real graphs in real processes, its quality against NumPy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llmfast import registry
from llmfast.bench.document import read_schema
from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench, print_document
from llmfast.bench.subject import Subject, Trial
from llmfast.bundle import Manifest, ModelBundle, write_manifest
from llmfast.errors import InputError, LlmfastError, NativeCrashError, OptionError, UnsupportedError
from llmfast.infer.rows import SlabRows
from llmfast.verdict import Gate
from tests.tiny_bench import QUICK, VOCAB, make_bundle, make_table, reference_figures, write_text, write_tokenizer


def write_bigram(folder: Path, name: str, table: np.ndarray) -> Path:
    """Write a decoder whose next token depends on the last one only, in llmfast's graph contract."""
    vocab = len(table)
    floats, ints = TensorProto.FLOAT, TensorProto.INT64
    past = ["batch", 1, "capacity", 2]
    inputs = [
        helper.make_tensor_value_info("input_ids", ints, ["batch", "seq"]),
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
        helper.make_tensor_value_info("num_logits", ints, [1]),
        *(helper.make_tensor_value_info(f"past_key_values.0.{part}", floats, past) for part in ("key", "value")),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", floats, ["batch", "num_logits", vocab]),
        *(helper.make_tensor_value_info(f"present.0.{part}", floats, past) for part in ("key", "value")),
    ]
    nodes = [
        helper.make_node("Neg", ["num_logits"], ["start"]),
        helper.make_node("Slice", ["input_ids", "start", "end", "axis"], ["last"]),
        helper.make_node("Gather", ["table", "last"], ["logits"]),
        *(helper.make_node("Identity", [f"past_key_values.0.{x}"], [f"present.0.{x}"]) for x in ("key", "value")),
    ]
    weights = [
        onnx.numpy_helper.from_array(table, "table"),
        onnx.numpy_helper.from_array(np.array([2**31], np.int64), "end"),
        onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"),
    ]
    graph = helper.make_graph(nodes, "bigram", inputs, outputs, weights)
    return write_bundle(folder / name, "text-generation", graph, {})


def write_bundle(path: Path, task: str, graph: onnx.GraphProto, architecture: dict[str, Any]) -> Path:
    """Write a bundle around a graph."""
    path.mkdir()
    write_tokenizer(path)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path / "model.onnx")
    architecture = {"vocab_size": VOCAB, "context_length": 64} | architecture
    write_manifest(path, Manifest(task, architecture=architecture, graphs={"model": {"file": "model.onnx"}}))
    return path


def test_real_decoders_in_real_processes(tmp_path: Path) -> None:
    base, ours = make_table(0), make_table(0) + make_table(1) / 4
    models = [write_bigram(tmp_path, "base", base), write_bigram(tmp_path, "ours", ours)]
    ids = write_text(tmp_path / "text")[: 3 * 6].reshape(3, 6)
    document = bench(models, replace(QUICK, data=tmp_path / "text")).document()
    same, moved = document["rows"]
    expected = reference_figures(base, ours, ids)
    assert {key: moved[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert same["kld"] == 0.0
    assert moved["placement"]["CPUExecutionProvider"] > 0
    assert moved["decode_tokens_per_s"] > 0
    assert moved["peak_rss_bytes"] is None or moved["peak_rss_bytes"] > 1e6
    json.dumps(document, allow_nan=False)


def write_encoder(folder: Path, name: str, task: str, table: np.ndarray) -> Path:
    """Write an encoder whose output is the mean of its words' rows of `table`, float32 [vocabulary, width]."""
    floats, ints, output = TensorProto.FLOAT, TensorProto.INT64, registry.load("tasks", task).OUTPUTS[-1]
    inputs = [helper.make_tensor_value_info(name, ints, ["batch", "seq"]) for name in ("input_ids", "attention_mask")]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Unsqueeze", ["attention_mask", "last_axis"], ["column"]),
        helper.make_node("Cast", ["column"], ["mask"], to=floats),
        helper.make_node("Mul", ["words", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "seq_axis"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "seq_axis"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], [output]),
    ]
    constants = {"table": table, "last_axis": np.array([-1]), "seq_axis": np.array([1])}
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    outputs = [helper.make_tensor_value_info(output, floats, ["batch", table.shape[1]])]
    architecture = {"labels": ["bad", "good"], "normalize": False, "problem_type": "single_label_classification"}
    architecture["vocab_size"] = len(table)
    return write_bundle(
        folder / name, task, helper.make_graph(nodes, "encoder", inputs, outputs, weights), architecture
    )


def test_real_embedders_in_real_processes(tmp_path: Path) -> None:
    base, ours = (np.random.default_rng(seed).normal(size=(VOCAB, 8)).astype(np.float32) for seed in (0, 1))
    ours = np.vstack([base + ours / 4, ours[:3]])  # of another vocabulary
    models = [write_encoder(tmp_path, name, "feature-extraction", table) for name, table in (("a", base), ("b", ours))]
    ids = np.random.default_rng(2).integers(VOCAB, size=(12, 2, 3))
    words = [["\t".join(" ".join(f"w{word}" for word in text) for text in pair)] for pair in ids]
    data = tmp_path / "pairs.tsv"
    data.write_text("".join(f"{score}\t{pair[0]}\n" for score, pair in enumerate(words)))
    document = bench(models, replace(QUICK, data=data, shapes="2x4,1x3")).document()
    row = document["rows"][1]
    vectors = {name: table[ids].mean(axis=2).astype(np.float64) for name, table in (("a", base), ("b", ours))}
    unit = {name: value / np.linalg.norm(value, axis=-1, keepdims=True) for name, value in vectors.items()}
    assert row["cosine_to_baseline"] == pytest.approx((unit["a"] * unit["b"]).sum(axis=-1).mean(), rel=1e-6)
    ranks = (unit["b"][:, 0] * unit["b"][:, 1]).sum(axis=-1).argsort().argsort()
    assert row["spearman"] == pytest.approx(np.corrcoef(ranks, np.arange(12))[0, 1])
    assert row["latency_s_2x4"] > 0
    assert row["samples_per_s_1x3_ratio"] > 0
    assert document["rows"][0]["cosine_to_baseline"] == pytest.approx(1.0)
    assert document["settings"]["data"]["lines"] == 12


def test_the_others_go_on_without_a_model_that_onnx_runtime_cannot_run(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(VOCAB, 8)).astype(np.float32)
    models = [write_encoder(tmp_path, name, "feature-extraction", table[: VOCAB - (name == "b")]) for name in "abc"]
    manifest = ModelBundle.open(models[0]).manifest
    write_manifest(models[1], replace(manifest, files={}))  # it says that its weights have a word more
    document = bench(models, replace(QUICK, data=None, shapes="8x64")).document()
    _, failed, other = document["rows"]
    assert failed["error"]["exit_code"] == NativeCrashError.exit_code
    assert "cannot bench `b`: the model failed: " in failed["error"]["message"]
    assert "indices element out of data bounds" in failed["error"]["message"]
    assert other["samples_per_s_8x64_ratio"] > 0


def test_real_classifiers_in_real_processes(tmp_path: Path) -> None:
    base, ours = (np.random.default_rng(seed).normal(size=(VOCAB, 2)).astype(np.float32) for seed in (0, 1))
    models = [write_encoder(tmp_path, name, "text-classification", table) for name, table in (("a", base), ("b", ours))]
    ids = np.random.default_rng(2).integers(VOCAB, size=(20, 3))
    labels = np.random.default_rng(3).integers(2, size=20)
    data = tmp_path / "labelled.txt"
    spelled = [str(label) if number % 2 else ["bad", "good"][label] for number, label in enumerate(labels)]
    lines = [f"{label} {' '.join(f'w{word}' for word in text)}" for label, text in zip(spelled, ids, strict=True)]
    data.write_text("\n".join(lines))
    gates = Gate("false_negative_rate", 0.9, "max"), Gate("false_negative_rate", 0.0, "max")
    options = replace(QUICK, data=data, shapes="1x3", false_negative_cost="good=1.2", gates=gates)
    document = bench(models, options).document()
    jsonschema.validate(document, read_schema())
    same, moved = document["rows"]
    theirs, mine = (table[ids].mean(axis=1).argmax(axis=1) for table in (base, ours))
    assert moved["accuracy"] == (mine == labels).mean()
    assert moved["flipped_labels"] == (mine != theirs).mean()
    assert same["flipped_labels"] == 0.0
    rates = []
    for table, row in ((base, same), (ours, moved)):
        logits = table[ids].mean(axis=1).astype(np.float64)
        flagged = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])) >= 1 / 2.2
        missed, alarms = ~flagged[labels == 1], flagged[labels == 0]
        assert row["false_negative_rate"] == pytest.approx(missed.mean())
        assert row["false_positive_rate"] == pytest.approx(alarms.mean())
        assert row["cost_per_case"] == pytest.approx((1.2 * missed.sum() + alarms.sum()) / 20)
        rates.append(missed.mean())
    assert 0 < rates[1] < 0.9
    assert moved["false_negative_rate_change"] == pytest.approx(rates[1] - rates[0])
    assert [entry["bundle"] for entry in document["verdict"]] == ["b", "b"]
    assert document["verdict"][1]["verdict"] != "passed"


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("text-classification", {"false_negative_cost": "dubious=2"}, "no label `dubious`"),
        ("text-classification", {"gates": (Gate("false_negative_rate", 0.1, "max"),)}, "needs --false-negative-cost"),
        ("feature-extraction", {"false_negative_cost": "good=2"}, "--false-negative-cost is for"),
    ],
)
def test_a_label_that_can_not_be_missed_is_named(
    task: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "data.txt").write_text("good w1\nbad w2\n")
    model = write_encoder(tmp_path, "a", task, np.zeros((VOCAB, 2), np.float32))
    with pytest.raises((OptionError, InputError), match=message):
        bench([model], replace(QUICK, shapes="1x3", data=tmp_path / "data.txt", **changed))


@pytest.mark.parametrize("cost", ["", "fraud", "fraud=", "=3", "fraud=0", "fraud=-1", "fraud=nan", "fraud=inf"])
def test_a_cost_that_is_none_is_refused(cost: str) -> None:
    with pytest.raises(OptionError, match="not LABEL=X"):
        BenchOptions(false_negative_cost=cost)


def test_a_malformed_graph_names_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(LlmfastError, match="cannot bench `broken`"):
        bench([make_bundle(tmp_path, "broken")], QUICK)


def test_decoders_in_batches_write_what_they_write_alone(fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[list[int]] = []
    decode = SlabRows.decode

    def watch(self: SlabRows, tokens: Any, lengths: Any, first: int = 0) -> np.ndarray:
        chosen.append(list(tokens))
        return decode(self, tokens, lengths, first)

    monkeypatch.setattr(SlabRows, "decode", watch)
    subject = Subject(fp32_bundle, threads=1, max_length=32)
    trial = Trial((7,), 259, {"2x8": (2, 8), "3x8": (3, 8)}, output_tokens=5)
    done = subject.generate(trial, "3x8")
    assert len(done.tokens_s) == 5
    assert done.prefill_s <= done.tokens_s[0]
    for row, prompt in enumerate(trial.ids(3, 8)):
        subject.engine.reset()
        token = int(subject.engine.prefill(prompt).argmax())
        for step in chosen:
            assert step[row] == token
            token = int(subject.engine.decode(token).argmax())
    chosen.clear()
    subject.generate(trial, "2x8")  # in the first rows of the same cache
    assert [len(step) for step in chosen] == [2] * 4
    other = Subject(fp32_bundle, threads=1, max_length=32)
    monkeypatch.setattr(other.engine, "takes_rows", False)  # as another exporter's graph
    with pytest.raises(UnsupportedError, match="one sequence at a time"):
        other.generate(trial, "2x8")


def test_a_sweep_of_batches_has_figures_of_each(fp32_bundle: Path, capsys: Any) -> None:
    options = BenchOptions(prompt_tokens=8, output_tokens=6, batch=(1, 4), rounds=3, threads=1)
    document = bench([fp32_bundle], options).document()
    jsonschema.validate(document, read_schema())
    row = document["rows"][0]
    for batch, case in ((1, "1x8"), (4, "4x8")):
        tokens = np.divide(batch, row["samples"][f"tpot_s_{case}"])
        assert row["samples"][f"decode_tokens_per_s_{case}"] == pytest.approx(tokens.tolist())
        assert row[f"cache_bytes_{case}"] == batch * 14 * 2 * 2 * 2 * 16 * 4  # positions, layers, K and V, heads, size
    capsys.readouterr()
    print_document(document)
    printed = capsys.readouterr().out
    assert "4x8 decode tok/s" in printed
    assert "8 prompt and 6 output tokens, 1, 4 sequences at once" in printed
    assert "4x8 KV MB" in printed
