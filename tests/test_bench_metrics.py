"""The metrics of llmfast bench: each against a plain formula, and all against their contract."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmfast import registry, report
from llmfast.bench import subject as subjects
from llmfast.bench.labelled import Examples
from llmfast.bench.machine import describe_machine, peak_rss_bytes
from llmfast.bench.metrics import (
    accuracy,
    decode,
    divergence,
    embedding,
    false_negatives,
    greedy,
    latency,
    output_error,
    prefill,
    translation,
)
from llmfast.bench.options import BenchOptions, parse_shapes
from llmfast.bench.subject import Generation, Spent, Trial
from llmfast.bundle import UNKNOWN_TASK, Manifest, ModelBundle
from llmfast.errors import InputError
from llmfast.example_inputs import random_inputs

VOCAB = 17
METRICS = registry.names("bench.metrics")


def test_ttft_includes_the_pick_and_prefill_does_not() -> None:
    subject = SimpleNamespace(generate=lambda trial, shape: Generation(0.5, (0.75, 1.0, 1.5)), latencies={})
    trial = Trial((0, 0), VOCAB, {"1x64": (1, 64)}, 3)
    assert prefill.measure(subject, trial) == {"ttft_s": 0.75, "prefill_tokens_per_s": 128.0}
    figures = decode.measure(subject, trial)
    assert (figures["tpot_s"], figures["decode_tokens_per_s"]) == ((1.5 - 0.75) / 2, 1 / 0.375)
    assert (figures["itl_p50_s"], figures["itl_p95_s"]) == (0.375, pytest.approx(0.4875))
    assert figures["itl_p99_s"] == pytest.approx(0.4975)
    assert subject.latencies == {"itl_s": [0.25, 0.5]}


def test_encoder_latency_is_the_median_of_a_round_and_per_shape() -> None:
    durations = iter([8.0, 0.5, 0.5, 0.25, 1.0, 0.125, 0.125, 0.125, 0.125, 0.125])
    now, feeds = [0.0], []

    def run(names: list[str], feed: dict[str, np.ndarray]) -> None:
        assert names == ["sentence_embedding"]
        feeds.append({name: array.shape for name, array in feed.items()})
        now[0] += next(durations)

    inputs = [SimpleNamespace(name=name, type="tensor(int64)") for name in ("input_ids", "attention_mask")]
    outputs = [SimpleNamespace(name=name) for name in ("sentence_embedding", "last_hidden_state")]
    session = SimpleNamespace(get_inputs=lambda: inputs, get_outputs=lambda: outputs, run=run)
    subject = SimpleNamespace(clock=lambda: now[0], session=session, task=registry.load("tasks", "feature-extraction"))
    subject.encoder = lambda batch: session
    subject.once = lambda trial, name, work: work()
    subject.spending = lambda: nullcontext(lambda: Spent(2.0, 1.0))
    subject.latencies = {}
    figures = latency.measure(subject, Trial((0, 0), VOCAB, parse_shapes("2x4, 1x3")))
    assert figures == {
        "latency_s_2x4": 0.5,
        "latency_p95_s_2x4": pytest.approx(6.6),
        "samples_per_s_2x4": 4.0,
        "latency_s_1x3": 0.125,
        "latency_p95_s_1x3": 0.125,
        "samples_per_s_1x3": 8.0,
    }
    assert feeds[0] == {"input_ids": (2, 4), "attention_mask": (2, 4)}


def test_a_turn_ends_when_the_process_is_idle() -> None:
    used = iter([0.0, 0.01, 0.01, 0.02, 0.02, 0.02, 0.5])
    sleeps: list[float] = []
    subjects.settle(lambda: next(used), sleeps.append)
    assert len(sleeps) == 3
    busy = iter(range(10_000))
    subjects.settle(lambda: float(next(busy)), sleeps.append)
    assert len(sleeps) == 103


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size() -> None:
    ids = np.arange(9) % VOCAB
    uniform = np.full((9, VOCAB), 3.0, np.float32)
    figures = divergence.figures(divergence.compare(divergence.Window(ids), uniform, uniform))
    assert figures["perplexity"] == pytest.approx(VOCAB, rel=1e-12)
    assert (figures["kld"], figures["top1_agreement"], figures["perplexity_ratio"]) == (0.0, 1.0, 1.0)


def test_divergence_is_stable_for_large_and_masked_logits() -> None:
    random = np.random.default_rng(2)
    base = random.normal(0, 1, (5, VOCAB)).astype(np.float32)
    ours = random.normal(0, 1, (5, VOCAB)).astype(np.float32)
    ids = np.array([0, 1, 2, 3, 4])
    plain = divergence.compare(divergence.Window(ids), ours, base)
    np.testing.assert_allclose(divergence.compare(divergence.Window(ids), ours + 8192, base - 8192), plain, rtol=1e-3)
    wide = np.pad(base, ((0, 0), (0, 3)), constant_values=-np.inf)
    np.testing.assert_allclose(
        divergence.compare(divergence.Window(ids), np.pad(ours, ((0, 0), (0, 3)), constant_values=-np.inf), wide), plain
    )


def test_spearman_matches_a_hand_made_example() -> None:
    first = np.array([[1.0, 0.0]] * 4)
    angles = np.array([0.1, 0.5, 0.4, 1.2])
    second = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    item = embedding.Texts(("",) * 8, (4.0, 3.0, 3.0, 1.0))
    vectors = np.concatenate([first, second])
    figures = embedding.figures(embedding.finish(embedding.compare(item, vectors, vectors)))
    # Ranks of the scores 3, 1.5, 1.5, 0 and of the similarities 3, 1, 2, 0: 4.5 / sqrt(4.5 * 5).
    assert figures["spearman"] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert figures["cosine_to_baseline"] == pytest.approx(1.0)


def test_single_texts_have_only_the_cosine_to_the_baseline() -> None:
    item = embedding.Texts(("", ""))
    rows = embedding.compare(item, np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 1.0]]))
    figures = embedding.figures(embedding.finish(rows))
    assert figures["spearman"] is None
    assert figures["cosine_to_baseline"] == pytest.approx((np.sqrt(0.5) + 1) / 2)


def test_vectors_of_another_size_keep_their_rank_correlation() -> None:
    item = embedding.Texts(("",) * 4, (1.0, 2.0))
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    figures = embedding.figures(embedding.finish(embedding.compare(item, vectors, np.ones((4, 3)))))
    assert figures["spearman"] == pytest.approx(1.0)
    assert np.isnan(figures["cosine_to_baseline"])


def test_embedding_data_is_read_in_pairs_or_lines(tmp_path: Path) -> None:
    pairs, lines = tmp_path / "pairs.txt", tmp_path / "lines.txt"
    pairs.write_text("".join(f"{number}\tleft {number}\tright {number}\n" for number in range(11)))
    lines.write_text("".join(f"line {number}\n" for number in range(11)))
    items = list(embedding.prepare(None, pairs, BenchOptions()))
    assert [len(item.texts) for item in items] == [16, 6]
    assert items[1].texts[:4] == ("left 8", "left 9", "left 10", "right 8")
    assert items[1].scores == (8.0, 9.0, 10.0)
    assert [len(item.texts) for item in embedding.prepare(None, lines, BenchOptions())] == [8, 3]


def test_labels_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    bundle = ModelBundle(tmp_path, Manifest("text-classification", architecture={"labels": ["BAD", "GOOD"]}), tmp_path)
    data = tmp_path / "data.txt"
    data.write_text("0 a\nGood b\n1 c\n")
    assert next(iter(accuracy.prepare(bundle, data, BenchOptions()))).labels == (0, 1, 1)
    for label in ("2", "neutral"):
        data.write_text(f"0 a\n{label} b\n")
        with pytest.raises(InputError, match=f"no label `{label}`"):
            accuracy.prepare(bundle, data, BenchOptions())


def test_accuracy_reads_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs").write_text("1 it rains\tit is wet\n0 dull\n")
    bundle = ModelBundle(tmp_path, Manifest("text-classification"), tmp_path)
    [item] = accuracy.prepare(bundle, tmp_path / "pairs", BenchOptions())
    assert item == Examples((1, 0), (("it rains", "it is wet"), "dull"))


def test_accuracy_and_f1_are_those_of_scikit_learn() -> None:
    wanted, found = [0, 0, 1, 1, 2, 2, 2, 1], [0, 1, 1, 1, 2, 0, 2, 2]
    item = Examples(tuple(wanted), ("",) * 8, ("bad", "Good", "so so"))
    names = ["bad", "good", "so so"]
    ours = np.array([(str(label), names[label]) for label in found])
    theirs = np.array([("7", names[label]) for label in [0, 0, 1, 1, 2, 2, 2, 1]])  # other numbers, same names
    figures = accuracy.figures(accuracy.compare(item, ours, theirs))
    # sklearn.metrics.f1_score(wanted, found, average="macro"): per label 1/2, 2/3, 2/3.
    assert figures == {"accuracy": 0.625, "f1": pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3), "flipped_labels": 0.375}


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("negative", "Positive")])
def test_a_label_of_another_spelling_is_not_flipped(names: tuple[str, str]) -> None:
    item = Examples((0, 1, 1), ("",) * 3, ("NEGATIVE", "POSITIVE"))
    ours = np.array([(str(label), names[label]) for label in (0, 1, 0)])
    theirs = np.array([(str(label), item.names[label]) for label in (0, 1, 1)])
    figures = accuracy.figures(accuracy.compare(item, ours, theirs))
    assert (figures["accuracy"], figures["flipped_labels"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_what_is_missed_is_counted_at_the_threshold_of_the_costs() -> None:
    item = false_negatives.Cases(Examples((1, 1, 1, 1, 0, 0, 2), ("",) * 7), 1, "fraud", 4.0)
    scores = np.array([0.9, 0.2, 0.19, 0.1, 0.3, 0.05, 0.2])  # flagged from 1 / (1 + 4) on
    rows = false_negatives.compare(item, scores, scores)
    assert false_negatives.figures(rows) == {
        "false_negative_rate": 2 / 4,
        "false_positive_rate": pytest.approx(2 / 3),
        "cost_per_case": pytest.approx((4 * 2 + 2) / 7),
    }
    only = false_negatives.figures(rows[:4])
    assert (only["false_negative_rate"], only["false_positive_rate"]) == (0.5, None)
    assert false_negatives.figures(rows[4:])["false_negative_rate"] is None


def test_a_label_is_found_by_name_where_a_bundle_numbers_it_otherwise() -> None:
    logits = np.array([[0.0, 2.0], [1.0, 0.0]], np.float32)
    architecture = {"labels": ["Fraud", "genuine"], "problem_type": "single_label_classification"}
    subject = SimpleNamespace(
        bundle=SimpleNamespace(manifest=Manifest("text-classification", architecture=architecture)),
        task=SimpleNamespace(classify=lambda *_: logits),
        session=None,
        encode=lambda texts: texts,
    )
    item = false_negatives.Cases(Examples((1, 0), ("a", "b")), 1, "fraud", 1.0)
    np.testing.assert_allclose(false_negatives.answer(subject, item), [1 / (1 + np.exp(2)), 1 / (1 + np.exp(-1))])


def test_recall_counts_the_documents_that_are_nearer() -> None:
    random = np.random.default_rng(0)
    documents = random.normal(size=(30, 8))
    queries = documents + random.normal(size=(30, 8)) * 0.8
    rows = []
    for start in range(0, 30, 10):
        vectors = np.concatenate([queries[start : start + 10], documents[start : start + 10]])
        item = embedding.Texts(("",) * 20, are_queries=True)
        rows.append(embedding.compare(item, vectors, vectors))
    figures = embedding.figures(embedding.finish(np.concatenate(rows)))
    unit = [array / np.linalg.norm(array, axis=1, keepdims=True) for array in (queries, documents)]
    ranks = [list(np.argsort(-(query @ unit[1].T))).index(number) for number, query in enumerate(unit[0])]
    assert figures["recall_at_1"] == np.mean([rank < 1 for rank in ranks]) < 1
    assert figures["recall_at_10"] == np.mean([rank < 10 for rank in ranks])
    assert figures["spearman"] is None


def test_bleu_and_chrf_are_those_of_sacrebleu(tmp_path: Path) -> None:
    import sacrebleu

    pairs = [
        ("a", "the cat sat on the mat today"),
        ("b", "a dog barks at the moon"),
        ("c", "rain falls on green hills"),
    ]
    answers = ["the cat sat on a mat today", "a dog barked at the moon", "rain falls on the green hills"]
    rows = np.concatenate([
        translation.compare(pair, np.array([text]), np.array([text])) for pair, text in zip(pairs, answers, strict=True)
    ])  # fmt: skip
    figures = translation.figures(rows)
    references = [[reference for _, reference in pairs]]
    assert figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, references).score)
    assert figures["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, references).score)


def test_greedy_answers_are_compared_up_to_the_first_difference() -> None:
    prompt = greedy.Prompt(np.arange(3), 4)
    rows = [greedy.compare(prompt, np.array([1, 2, 3, 4]), np.array(theirs)) for theirs in ([1, 2, 3, 4], [1, 2, 9, 4])]
    assert greedy.figures(np.concatenate(rows)) == {"first_divergent_token": 3.0, "same_answers": 0.5}


def test_divergence_equals_a_float64_reference() -> None:
    """Mean and quantiles of KL divergence, perplexity and bits per byte, to 1e-5, for far and for near candidates."""
    random = np.random.default_rng(1)
    for noise in (2.0, 0.1, 0.002):
        base = random.normal(0, 4, (65, 5000)).astype(np.float32)
        ours = base + random.normal(0, noise, base.shape).astype(np.float32)
        ids = random.integers(5000, size=65)
        window = divergence.Window(ids, num_bytes=200, width=70, context_tokens=17)
        figures = divergence.figures(divergence.compare(window, ours, base))
        p, q = (
            np.exp(array.astype(np.float64)) / np.exp(array.astype(np.float64)).sum(axis=1, keepdims=True)
            for array in (base, ours)
        )
        klds = (p * np.log(p / q)).sum(axis=1)[16:-1]
        nll = -np.log(q[np.arange(64), ids[1:]])[16:]
        expected = {
            "kld": klds.mean(),
            "kld_median": np.median(klds),
            "kld_p99": np.quantile(klds, 0.99),
            "kld_max": klds.max(),
            "perplexity": np.exp(nll.mean()),
            "bits_per_byte": nll.sum() / np.log(2) / 200,
        }
        assert {key: figures[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_machine_says_what_figures_depend_on() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["onnxruntime"]
    json.dumps(machine, allow_nan=False)
    assert peak_rss_bytes() is None or peak_rss_bytes() > 1e6


@pytest.mark.parametrize("name", METRICS)
def test_metric_honours_the_contract(name: str) -> None:
    plugin = registry.load("bench.metrics", name)
    assert plugin.__doc__
    assert isinstance(plugin.ORDER, int)
    assert set(plugin.TASKS) <= {*registry.names("tasks"), UNKNOWN_TASK}
    assert set(plugin.NEEDS) <= {"tokenizer", "vocab_size", "example_inputs"}
    assert plugin.HIGHER_IS_BETTER
    assert all(isinstance(value, bool) for value in plugin.HIGHER_IS_BETTER.values())
    for column in plugin.COLUMNS:
        assert isinstance(column, report.Column)
        is_ratio = column.key.endswith("_ratio") and column.key not in plugin.HIGHER_IS_BETTER
        assert column.key.removesuffix("_ratio" if is_ratio else "") in plugin.HIGHER_IS_BETTER
        assert column.title.format(shape="", case="")
        assert isinstance(column.spell(1.5), str)
    functions = {"static": ["measure"], "speed": ["measure"], "quality": ["prepare", "answer", "compare", "figures"]}
    assert all(callable(getattr(plugin, function)) for function in functions[plugin.KIND])
    if plugin.KIND == "quality":
        assert plugin.UNIT
        assert set(plugin.COMPARED) <= set(plugin.HIGHER_IS_BETTER)
        assert isinstance(plugin.DATA, str)


def test_orders_and_keys_of_metrics_do_not_collide() -> None:
    plugins = [registry.load("bench.metrics", name) for name in METRICS]
    assert len({plugin.ORDER for plugin in plugins}) == len(plugins)
    keys = [key for plugin in plugins for key in plugin.HIGHER_IS_BETTER]
    assert len(set(keys)) == len(keys)


def test_inputs_of_a_module_are_like_its_examples() -> None:
    examples = {
        "ids": {"dtype": "int64", "shape": [2, 50], "low": 3, "high": 5},
        "mask": {"dtype": "bool", "shape": [2, 50], "low": False, "high": True},
        "x": {"dtype": "float32", "shape": [4], "low": -2.0, "high": 1.0},
    }
    bundle = ModelBundle(Path("b"), Manifest("unknown", architecture={"example_inputs": examples}), Path("m"))
    first, second = (random_inputs(bundle, (0, seed)) for seed in (1, 2))
    assert {name: (str(array.dtype), list(array.shape)) for name, array in first.items()} == {
        name: (example["dtype"], example["shape"]) for name, example in examples.items()
    }
    assert set(first["ids"].ravel().tolist()) == {3, 4, 5}
    assert set(first["mask"].ravel().tolist()) == {False, True}
    assert -2 <= first["x"].min() <= first["x"].max() <= 1
    assert not np.array_equal(first["ids"], second["ids"])


def test_output_error_is_relative_and_over_all_outputs() -> None:
    outputs = [np.array([[3.0, -np.inf]], np.float32), np.array([4], np.int64)]
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="x")], run=lambda names, feeds: outputs)
    subject = SimpleNamespace(session=session)
    reference = output_error.answer(subject, {"x": np.ones(1)})
    assert reference.tolist() == [3, -np.inf, 4]
    assert output_error.figures(output_error.compare({}, reference, reference)) == {"output_error": 0}
    rows = [output_error.compare({}, reference + np.array([error, 0, 0]), reference) for error in (1.0, 2.0)]
    assert output_error.figures(np.concatenate(rows)) == {"output_error": pytest.approx(np.sqrt(5 / 50))}
    assert np.isnan(output_error.compare({}, reference[:1], reference)).all()
    with pytest.raises(InputError, match="its inputs are x, the baseline's are y"):
        output_error.answer(subject, {"y": np.ones(1)})
