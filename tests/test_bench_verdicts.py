"""llmfast bench: what is better, worse or unsure; gates; failures of one bundle; documents and their comparison."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast.bench import processes, rounds
from llmfast.bench import stage as bench_stage
from llmfast.bench.comparison import compare_documents
from llmfast.bench.document import load_document, read_schema, save_document
from llmfast.bench.energy import open_meter
from llmfast.bench.junit import to_junit
from llmfast.bench.options import BenchOptions, parse_numbers
from llmfast.bench.profile import summarize_events
from llmfast.bench.roofline import measure_bandwidth
from llmfast.bench.stage import bench, print_document
from llmfast.bench.statistics import (
    coverage,
    decide,
    launch_interval,
    median,
    safe_interval,
    simultaneous,
    unpaired_interval,
)
from llmfast.bench.watch import Snapshot, describe_change
from llmfast.bench.workload import plan
from llmfast.cli import app
from llmfast.errors import InputError, LlmfastError, NativeCrashError, OptionError
from llmfast.verdict import Gate, enforce, judge, parse_drop, parse_speedup, spell
from tests.fake_bench import Stage, make_stage
from tests.tiny_bench import QUICK, make_bundle, make_table, write_text


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return make_stage(monkeypatch)


# Statistics


def _noisy(count: int, slower: float, seed: int, outliers: float = 0.1) -> list[float]:
    """Return ratios of two bundles on a shared machine: noise of 3 %, now and then a round that was disturbed."""
    random = np.random.default_rng(seed)
    times = np.exp(random.normal(0, 0.03, (2, count)))
    times *= 1 + (random.random((2, count)) < outliers) * random.exponential(0.5, (2, count))
    return list(times[0] / (times[1] * (1 + slower)))


def _verdicts(count: int, slower: float, seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        ratios = _noisy(count, slower, seed)
        found.append(decide(median(ratios), safe_interval(ratios, 0, simultaneous(8)), 0.02))
    return found


def test_a_bundle_against_itself_shows_no_difference() -> None:
    for count in (4, 8, 40):
        verdicts = _verdicts(count, 0.0, range(200))
        assert sum(verdict in ("equal", "inconclusive") for verdict in verdicts) >= 0.98 * 200


def test_a_delay_of_five_percent_is_found_in_sixty_rounds() -> None:
    assert _verdicts(60, 0.05, range(100)).count("worse") >= 95
    assert _verdicts(60, -0.05, range(100)).count("better") >= 95


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    hits = 0
    for seed in range(300):
        low, high = safe_interval(_noisy(30, 0.0, seed), 0)
        hits += low <= 1 <= high
    assert hits >= 0.92 * 300


def test_few_rounds_are_widened_to_students_t() -> None:
    logs = np.array([0.9, 1.0, 1.1])
    low, high = safe_interval(list(np.exp(logs)))
    reach = 4.303 * logs.std(ddof=1) / np.sqrt(3)  # the table's t for 95 %, two degrees of freedom
    assert (low, high) == pytest.approx((np.exp(1 - reach), np.exp(1 + reach)), rel=0.02)
    many = [2.0] * 10 + [3.0] * 10 + [90.0]  # coverage suffices: the outlier does not count
    assert coverage(len(many)) > 0.95
    assert safe_interval(many)[1] == 3.0
    assert safe_interval([1.0]) is None


@pytest.mark.parametrize(
    ("estimate", "interval", "verdict"),
    [
        (1.2, (1.1, 1.3), "better"),
        (0.8, (0.7, 0.9), "worse"),
        (1.0, (0.99, 1.01), "equal"),
        (1.01, (1.001, 1.05), "inconclusive"),  # it is above 1, but not by what counts as a difference
        (1.1, (0.9, 1.3), "inconclusive"),
        (1.1, None, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_decisions(estimate: float | None, interval: Any, verdict: str) -> None:
    assert decide(estimate, interval, 0.02) == verdict


# Rounds on a fake clock


def test_rounds_go_on_until_ratios_are_known_or_time_is_up(stage: Stage, tmp_path: Path) -> None:
    for name in "ab":
        stage.add(name, prefill_s=1.0, decode_s=1.0)
    random = np.random.default_rng(3)

    def disturb(name: str, method: str) -> None:
        if method == "measure":
            for engine in stage.engines.values():
                engine.prefill_s = engine.decode_s = float(np.exp(random.normal(0, 0.2)))

    models = [make_bundle(tmp_path, name) for name in "ab"]
    adaptive = replace(QUICK, rounds=None, max_time=None)
    document = bench(models, adaptive, clock=stage.clock)
    assert document["settings"]["rounds"] == 8  # no noise: the fewest suffice
    stage.fail = disturb
    document = bench(models, replace(adaptive, max_time=1000.0), clock=stage.clock)
    assert 8 < document["settings"]["rounds"] <= 1000 / 10  # a round takes 10 s
    assert document["rows"][1]["verdict"]["decode_tokens_per_s"] == "inconclusive"
    assert bench(models, replace(adaptive, max_time=0.0), clock=stage.clock)["settings"]["rounds"] == 8
    assert bench(models, replace(QUICK, rounds=11), clock=stage.clock)["settings"]["rounds"] == 11


def test_rounds_end(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "MOST_ROUNDS", 12)
    stage.add("a")

    def slow_down(name: str, method: str) -> None:
        stage.engines["a"].decode_s *= 2 if method == "measure" else 1

    stage.fail = slow_down
    document = bench([make_bundle(tmp_path, "a")], replace(QUICK, rounds=None), clock=lambda: 0.0)
    assert document["settings"]["rounds"] == 12


def test_verdicts_of_a_row(stage: Stage, tmp_path: Path) -> None:
    stage.add("base", table=make_table(0))
    stage.add("fast", prefill_s=0.25, decode_s=0.5, table=make_table(0) + make_table(1))
    write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in ("base", "fast")]
    base, fast = bench(models, replace(QUICK, rounds=8, data=tmp_path / "text"))["rows"]
    assert base["verdict"] == {}
    speeds = ("prefill_tokens_per_s", "ttft_s", "decode_tokens_per_s", "tpot_s")
    assert [fast["verdict"][key] for key in speeds] == ["better", "better", "worse", "worse"]
    assert fast["perplexity_change"] == pytest.approx(fast["perplexity"] - base["perplexity"])
    low, high = fast["perplexity_change_spread"]
    assert low <= fast["perplexity_change"] <= high
    assert fast["verdict"]["perplexity"] == ("worse" if low > 0 else "inconclusive")
    same = bench([models[0], models[0]], replace(QUICK, rounds=8, data=tmp_path / "text"))["rows"][1]
    assert {same["verdict"][key] for key in (*speeds, "perplexity", "bits_per_byte")} == {"equal"}


# Sweeps and lengths


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("512", (512,)),
        ("128,512,128", (128, 512)),
        ("1-4", (1, 2, 3, 4)),
        ("128-512+128", (128, 256, 384, 512)),
        ("1-8*2", (1, 2, 4, 8)),
        ("1, 8-9", (1, 8, 9)),
    ],
)
def test_numbers_and_ranges(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_numbers(text, "-p") == numbers


@pytest.mark.parametrize("text", ["", "x", "1,", "8-1", "1-8*1", "1-8+0", "1-100000", "-5", "1-2-3"])
def test_bad_numbers_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="-p"):
        parse_numbers(text, "-p")


def test_a_sweep_has_figures_for_every_length(stage: Stage, tmp_path: Path) -> None:
    stage.add("a")
    document = bench([make_bundle(tmp_path, "a")], replace(QUICK, prompt_tokens=(4, 8), gates=()))
    row = document["rows"][0]
    assert (row["prefill_tokens_per_s_1x4"], row["prefill_tokens_per_s_1x8"]) == (8.0, 16.0)
    assert "prefill_tokens_per_s" not in row
    assert document["settings"]["prompt_tokens"] == [4, 8]
    gate = Gate("tpot_s_ratio", 0.5, "min")
    document = bench([make_bundle(tmp_path / "x", "a")], replace(QUICK, prompt_tokens=(4, 8), gates=(gate,)))
    assert [entry["figure"] for entry in document["verdict"]] == ["tpot_s_1x4_ratio", "tpot_s_1x8_ratio"]


def test_a_sweep_over_threads_has_a_row_for_each(stage: Stage, tmp_path: Path) -> None:
    stage.add("a")
    document = bench([make_bundle(tmp_path, "a")], replace(QUICK, threads=(1, 2)))
    assert [(row["bundle"], row["threads"]) for row in document["rows"]] == [("a [1 threads]", 1), ("a [2 threads]", 2)]
    assert document["baseline"] == "a [1 threads]"


def test_default_lengths_fit_a_small_context(capsys: pytest.CaptureFixture[str]) -> None:
    work = plan("text-generation", BenchOptions(), [("big", 4096), ("small", 64)])
    assert (work.shapes, work.output_tokens, work.seq_len) == ({"1x48": (1, 48)}, 16, 64)
    assert "`small` holds 64 tokens: 48 prompt and 16 output tokens" in capsys.readouterr().err
    assert plan("text-generation", BenchOptions(), [("big", 4096)]).shapes == {"1x512": (1, 512)}
    assert plan("feature-extraction", BenchOptions(), [("small", 32)]).shapes == {"8x32": (8, 32)}
    assert plan("feature-extraction", BenchOptions(prompt_tokens=(4, 8), batch=(1, 2)), []).shapes == {
        "1x4": (1, 4),
        "1x8": (1, 8),
        "2x4": (2, 4),
        "2x8": (2, 8),
    }
    with pytest.raises(OptionError, match="--batch 8: models for text-generation are measured one sequence at a time"):
        plan("text-generation", BenchOptions(batch=(1, 8)), [])
    # A prompt that fits leaves the rest to the output; one that does not is all that the error names.
    assert plan("text-generation", BenchOptions(prompt_tokens=60), [("small", 64)]).output_tokens == 4
    with pytest.raises(OptionError, match=r"^--prompt-tokens 70: 72 tokens, `small` holds 64"):
        plan("text-generation", BenchOptions(prompt_tokens=70), [("small", 64)])


# Gates


@pytest.mark.parametrize(
    ("gate", "value", "spread", "verdict"),
    [
        (Gate("kld", 0.1, "max"), 0.05, [0.04, 0.06], "passed"),
        (Gate("kld", 0.1, "max"), 0.09, [0.08, 0.11], "inconclusive"),
        (Gate("kld", 0.1, "max"), 0.2, [0.15, 0.25], "MISSED"),
        (Gate("spearman", 0.5, "min"), 0.5, None, "passed"),
        (Gate("tpot_s_ratio", 2, "min"), 1.9, [1.8, 1.95], "MISSED"),
        (Gate("tpot_s_ratio", 2, "min"), None, None, "not measured"),
    ],
)
def test_gates_decide_by_the_interval(gate: Gate, value: Any, spread: Any, verdict: str) -> None:
    rows = [{"bundle": "base"}, {"bundle": "x", gate.figure: value, f"{gate.figure}_spread": spread}]
    for policy in ("fail", "pass"):
        (entry,) = judge(rows, "base", [gate], policy)
        assert (entry["bundle"], entry["verdict"]) == ("x", verdict)
        assert entry["passed"] is (verdict == "passed" or (verdict == "inconclusive" and policy == "pass"))
        number = "not measured" if value is None else f"{value:.4g}"
        assert number in spell(entry)
        assert f"{gate.limit:.4g}" in spell(entry)


def test_an_inconclusive_gate_says_what_helps() -> None:
    rows = [{"bundle": "x", "kld": 0.1, "kld_spread": [0.05, 0.15]}]
    with pytest.raises(
        LlmfastError, match=r"gate inconclusive: `x` kld 0.1 \(0.05 to 0.15\), asked at most 0.12"
    ) as raised:
        enforce(judge(rows, "", [Gate("kld", 0.12, "max")]))
    assert "--inconclusive pass" in raised.value.hint
    assert raised.value.exit_code == 7


def test_drops_are_in_points_and_against_the_baseline() -> None:
    higher = {"accuracy": True, "perplexity": False, "flipped_labels": False, "cosine_to_baseline": True}
    compared = ("accuracy", "perplexity")
    assert parse_drop("accuracy=1", higher, compared) == Gate("accuracy_change", -0.01, "min")
    assert parse_drop("perplexity=0.5", higher, compared) == Gate("perplexity_change", 0.5, "max")
    assert parse_drop("flipped-labels=2", higher, compared) == Gate("flipped_labels", 0.02, "max")
    assert parse_drop("cosine_to_baseline=0.01", higher, compared) == Gate("cosine_to_baseline", 0.99, "min")
    with pytest.raises(OptionError, match="--max-drop `kld`: no quality of this run"):
        parse_drop("kld=1", higher, compared)
    with pytest.raises(OptionError, match=r"--max-drop `accuracy=x`: not METRIC=X"):
        parse_drop("accuracy=x", higher, compared)
    with pytest.raises(OptionError, match=r"--min-speedup `tpot_s`: not METRIC=X"):
        parse_speedup("tpot_s")


def test_all_gates_of_one_run(stage: Stage, tmp_path: Path) -> None:
    stage.add("base")
    stage.add("x", table=make_table(0) + make_table(1) / 4)
    write_text(tmp_path / "text")
    gates = (
        Gate("kld", 9, "max"),
        Gate("perplexity_ratio", 0.1, "max"),
        Gate("size_bytes", 1e6, "max"),
        Gate("peak_rss_bytes", 1.0, "max"),
        Gate("tpot_s_ratio", 0.9, "min"),
    )
    models = [make_bundle(tmp_path, name) for name in ("base", "x")]
    drops = ("perplexity=100", "top1_agreement=100")
    options = replace(QUICK, rounds=8, data=tmp_path / "text", gates=gates, max_drops=drops)
    verdicts = {entry["figure"]: entry["verdict"] for entry in bench(models, options)["verdict"]}
    assert verdicts == {
        "kld": "passed",
        "perplexity_ratio": "MISSED",
        "size_bytes": "passed",
        "peak_rss_bytes": "MISSED",
        "tpot_s_ratio": "passed",
        "perplexity_change": "passed",
        "top1_agreement": "passed",
    }
    with pytest.raises(OptionError, match="gate on `accuracy`: this run does not measure it"):
        bench(models, replace(QUICK, gates=(Gate("accuracy", 1, "max"),)))


# A bundle that fails


def _crash(bundle: str, method: str) -> Callable[[str, str], None]:
    def fail(name: str, called: str) -> None:
        if (name, called) == (bundle, method):
            raise NativeCrashError("worker crashed with SIGSEGV", "the model may be malformed")

    return fail


@pytest.mark.parametrize("method", ["facts", "measure", "describe", "compare"])
def test_the_others_go_on_without_a_candidate_that_crashes(
    stage: Stage, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        stage.add(name)
    stage.fail = _crash("b", method)
    write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in "abc"]
    document = bench(models, replace(QUICK, data=tmp_path / "text", gates=(Gate("kld", 9, "max"),)))
    _, broken, sound = document["rows"]
    assert broken["error"]["exit_code"] == 9
    assert "`b`: worker crashed with SIGSEGV" in broken["error"]["message"]
    assert broken["samples"] == {}
    assert "kld" not in broken or broken["kld"] is None
    assert (sound["kld"], sound["decode_tokens_per_s"]) == (0.0, 4.0)
    assert [entry["verdict"] for entry in document["verdict"]] == ["not measured", "passed"]
    assert "the others go on without it" in capsys.readouterr().err
    print_document(document)
    printed = capsys.readouterr().out
    assert "b (failed)" in printed
    assert "`b` failed: cannot bench `b`: worker crashed with SIGSEGV" in printed
    jsonschema.validate(json.loads(json.dumps(document)), read_schema())


def test_a_crash_is_exit_code_nine(stage: Stage, tmp_path: Path) -> None:
    for name in "ab":
        stage.add(name)
    stage.fail = _crash("b", "measure")
    models = [str(make_bundle(tmp_path, name)) for name in "ab"]
    result = CliRunner().invoke(app, ["bench", *models, "-p", "8", "-n", "4", "--rounds", "2", "--max-size", "1GB"])
    assert result.exit_code == 9
    assert "b (failed)" in result.stdout
    assert "passed: `b`" not in result.stdout
    assert "worker crashed with SIGSEGV" in result.stderr


# Memory for one bundle at a time


def test_bundles_are_opened_in_turn_when_memory_is_short(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        stage.add(name, table=make_table(0) + make_table("abc".index(name)) / 4)
    write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in "abc"]
    options = replace(QUICK, data=tmp_path / "text")
    expected = bench(models, options)["rows"]
    monkeypatch.setattr(processes, "available_memory", lambda: 10)
    opened: set[str] = set()
    most = [0]

    def follow(name: str, method: str) -> None:
        if method == "facts":
            opened.add(name)
        opened.difference_update(set(stage.closed[-1:]) - {name})
        most[0] = max(most[0], len(opened))

    stage.closed.clear()
    stage.fail = follow
    rows = bench(models, options)["rows"]
    assert most[0] <= 2  # the baseline and one candidate, while quality is measured
    assert "each is opened for its turn only" in capsys.readouterr().err
    for row, other in zip(rows, expected, strict=True):
        for key in ("kld", "perplexity", "decode_tokens_per_s", "prefill_tokens_per_s"):
            assert row[key] == other[key]
        assert len(row["samples"]["tpot_s"]) == QUICK.rounds
        assert row["size_bytes"] == other["size_bytes"]


# Documents


@pytest.fixture
def document(stage: Stage, tmp_path: Path) -> dict[str, Any]:
    stage.add("base")
    stage.add("x", prefill_s=0.25, decode_s=0.125, table=make_table(0) + make_table(1) / 4)
    write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in ("base", "x")]
    options = replace(QUICK, rounds=8, data=tmp_path / "text", gates=(Gate("kld", 1e-9, "max"),), price_per_hour=3.6)
    return bench(models, options)


def test_the_document_keeps_its_schema(document: dict[str, Any]) -> None:
    schema = read_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    found = json.loads(json.dumps(document, allow_nan=False))
    jsonschema.validate(found, schema)
    for broken in (
        found | {"schema_version": 1},
        found | {"surprise": 1},
        found | {"rows": [found["rows"][0] | {"decode_tokens_per_s": "fast"}]},
        {key: value for key, value in found.items() if key != "machine"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_the_document_says_what_it_was_measured_on(document: dict[str, Any]) -> None:
    row = document["rows"][1]
    assert document["machine"]["onnxruntime"]
    assert (row["provider"], row["threads"], row["placement"]) == ("cpu", 1, {"CPUExecutionProvider": 3})
    assert list(row["model_sha256"]) == ["model.onnx"]
    assert row["energy_source"].startswith("estimate: CPU time x 3.5 W")
    assert len(row["latencies"]["itl_s"]) == 8 * (QUICK.output_tokens - 1)
    # 3.6 an hour are a thousandth a second; 8 tokens are read in a quarter of one, a token is written in an eighth.
    assert row["price_per_million_input_tokens"] == pytest.approx(1e6 * 0.001 * 0.25 / 8)
    assert row["price_per_million_output_tokens"] == pytest.approx(1e6 * 0.001 * 0.125)


def test_documents_are_saved_and_read_again(document: dict[str, Any], tmp_path: Path) -> None:
    save_document(document, tmp_path / "run.json")
    assert load_document(tmp_path / "run.json") == json.loads(json.dumps(document))
    for content, message in (
        ("[]", "not a document"),
        ("{", "not a JSON file"),
        (json.dumps(document | {"schema_version": 99}), "schema version 99"),
        (json.dumps(document | {"rows": [{}]}), "a row without `bundle`"),
        (json.dumps(document | {"rows": [{"bundle": "x"}]}), "`x` has no `samples`"),
        (json.dumps(document | {"machine": 1}), "no `machine`"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=message):
            load_document(tmp_path / "bad.json")


def _slowed(document: dict[str, Any], factor: float, seed: int, noise: float = 0.02) -> dict[str, Any]:
    """Return a document as a later run gives it, in which candidates are slower by a factor."""
    copy = json.loads(json.dumps(document))
    random = np.random.default_rng(seed)
    for row in copy["rows"]:
        mood = random.normal(1.3, 0.01)  # the machine is slower today, for all
        by = 1.0 if row["bundle"] == copy["baseline"] else factor
        for key, samples in row["samples"].items():
            times = np.exp(random.normal(0, noise, len(samples)))
            if key.endswith("_per_s"):
                row["samples"][key] = list(np.array(samples) / mood / by * times)
            elif key.endswith("_s"):
                row["samples"][key] = list(np.array(samples) * mood * by * times)
            row[key] = median(row["samples"][key])
    return copy


def test_a_planted_regression_is_found_and_nothing_else(document: dict[str, Any]) -> None:
    before = _slowed(document, 1.0, 1)
    gate = Gate("decode_tokens_per_s_ratio", 0.95, "min")
    for factor, verdict, passed in ((1.0, ("equal", "inconclusive"), True), (1.25, ("worse",), False)):
        compared = compare_documents(before, _slowed(document, factor, 2), ("old", "new"), [gate], (), "pass")
        rows = {(row["bundle"], row["figure"]): row for row in compared["rows"]}
        decode = rows["x", "decode_tokens_per_s"]
        assert decode["basis"] == "baseline"  # so that the machine's mood does not count
        assert decode["verdict"] in verdict
        assert decode["ratio"] == pytest.approx(1 / factor, abs=0.04)
        assert rows["x", "kld"]["verdict"] == "equal"
        assert rows["x", "size_bytes"]["verdict"] == "equal"
        (entry,) = [entry for entry in compared["verdict"] if entry["bundle"] == "x"]
        assert entry["passed"] is passed


def test_comparisons_of_other_work_are_refused_or_noted(document: dict[str, Any]) -> None:
    other = json.loads(json.dumps(document))
    other["settings"]["shapes"] = ["1x9"]
    with pytest.raises(InputError, match="measured different work: shapes"):
        compare_documents(document, other, ("old", "new"))
    other = json.loads(json.dumps(document))
    for row in other["rows"]:
        row["bundle"] = f"other {row['bundle']}"
    with pytest.raises(InputError, match="no bundle of `new` is in `old`"):
        compare_documents(document, other, ("old", "new"))
    other = json.loads(json.dumps(document))
    other["machine"]["cpu"] = "another"
    other["settings"]["data"]["sha256"] = "0" * 64
    other["rows"][0]["model_sha256"] = {"model.onnx": "0" * 64}
    compared = compare_documents(document, other, ("old", "new"))
    assert any("cpu was" in warning for warning in compared["warnings"])
    assert any("different data" in warning for warning in compared["warnings"])
    assert any("no baseline in common" in warning for warning in compared["warnings"])
    assert not [row for row in compared["rows"] if row["figure"] == "kld"]
    with pytest.raises(OptionError, match="gate on `nonsense`"):
        compare_documents(document, document, ("old", "new"), [Gate("nonsense", 1, "max")])


def test_ci_fails_on_a_planted_regression_and_passes_without(document: dict[str, Any], tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("old", "same", "slow")}
    for (name, file), factor in zip(files.items(), (1.0, 1.0, 1.5), strict=True):
        save_document(_slowed(document, factor, len(name), noise=0.001), file)
    junit = tmp_path / "junit.xml"
    for new, code in (("same", 0), ("slow", 7)):
        arguments = ["bench", "--compare", str(files["old"]), str(files[new]), "--junit", str(junit)]
        result = CliRunner().invoke(app, [*arguments, "--min-speedup", "decode_tokens_per_s=0.95", "--format", "md"])
        assert result.exit_code == code, result.output
        assert f"old.json -> {new}.json" in result.stdout
        suite = ElementTree.parse(junit).getroot()
        assert (suite.attrib["failures"] != "0") == (code == 7)
    for arguments in (["a.json"], []):
        assert CliRunner().invoke(app, ["bench", "--compare", *arguments]).exit_code == 2


def test_foreign_names_are_escaped_everywhere(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    name = "<script>alert(1)</script>|\x1b[31m=cmd()&\x00"
    document["rows"][1]["bundle"] = document["verdict"][0]["bundle"] = name
    xml = to_junit(document)
    cases = ElementTree.fromstring(xml).iter("testcase")
    assert {case.attrib["classname"] for case in cases} == {"base", name.replace("\x1b", "�").replace("\x00", "�")}
    for form in ("md", "table", "csv"):
        document["rows"][1]["bundle"] = name if form != "csv" else f"={name}"
        print_document(document, form)
        printed = capsys.readouterr().out
        assert ("<script>" in printed) == (form != "md")
        assert "\x1b" not in printed or form == "csv"
        assert "\n=<script>" not in printed


def test_junit_has_a_case_for_every_gate_and_bundle(document: dict[str, Any]) -> None:
    document["rows"][0]["error"] = {"kind": "NativeCrashError", "message": "died", "hint": "why", "exit_code": 9}
    root = ElementTree.fromstring(to_junit(document))
    assert root.attrib == {"name": "llmfast bench", "tests": "3", "failures": "1", "errors": "1"}
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.attrib["message"].startswith("MISSED: `x` kld 0.")
    error = root.find(".//error")
    assert error is not None
    assert error.attrib == {"message": "died", "type": "NativeCrashError"}


def test_files_into_a_missing_folder_are_refused_before_anything_runs(stage: Stage, tmp_path: Path) -> None:
    stage.add("a")
    model = str(make_bundle(tmp_path, "a"))
    for flag in ("--save", "--junit"):
        result = CliRunner().invoke(app, ["bench", model, flag, str(tmp_path / "missing" / "file")])
        assert result.exit_code == 2
        assert "no such folder" in result.stderr
    assert stage.calls == []


# The machine


def test_disturbances_are_told(tmp_path: Path) -> None:
    before = Snapshot(busy=1000, total=2000, stolen=0, swapped=10, throttled=3)
    quiet = Snapshot(busy=1500, total=3000, stolen=1, swapped=20, throttled=3)
    assert describe_change(before, quiet, own=490) == []
    loud = Snapshot(busy=1900, total=3000, stolen=100, swapped=5000, throttled=5)
    warnings = describe_change(before, loud, own=400)
    assert [warning.split(" ")[1] for warning in warnings] == ["processes", "hypervisor", "processor", "machine"]
    assert "50% of the machine's time" in warnings[0]
    assert describe_change(None, loud, 0) == []
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  10 0 5 100 2 1 1 4 0 0\ncpu0 1\n")
    (tmp_path / "proc/vmstat").write_text("pswpin 3\npswpout 4\nnr_free 1\n")
    core = tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle"
    core.mkdir(parents=True)
    (core / "core_throttle_count").write_text("7\n")
    assert Snapshot.take(tmp_path) == Snapshot(busy=17, total=123, stolen=4, swapped=7, throttled=7)
    assert Snapshot.take(tmp_path / "nowhere") is None


def test_energy_is_read_from_rapl_and_else_estimated(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (tmp_path / "intel-rapl:0:0").mkdir()  # a core's share of the package, not to be counted twice
    (package / "max_energy_range_uj").write_text("999999")
    (package / "energy_uj").write_text("900000")
    meter = open_meter("cpu", 3.5, powercap=tmp_path)
    before = meter.read()
    (package / "energy_uj").write_text("400000")  # it has wrapped
    assert meter.source == "rapl"
    assert meter.read() - before == pytest.approx(0.5)
    now = [2.0]
    meter = open_meter("cpu", 3.5, cpu_time=lambda: now[0], powercap=tmp_path / "none")
    assert (meter.source, meter.read()) == ("estimate: CPU time x 3.5 W per core", 7.0)


def test_bandwidth_is_bytes_by_seconds_of_the_best_pass() -> None:
    times = iter(np.cumsum([0, 0.5, 0.1, 0.25, 0.1, 0.5, 0.1, 0.5, 0.1, 0.5]))
    assert measure_bandwidth(2, lambda: float(next(times)), size=1 << 20) == pytest.approx((1 << 20) / 0.25)


# Profiles


def test_events_are_summed_by_operator_and_role() -> None:
    def event(name: str, operator: str, start: int, took: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": took, "args": {"op_name": operator}}

    events = [
        event("model.layers.0.mlp.up_proj", "MatMul", 5, 100),  # before the phase
        event("model.layers.0.mlp.up_proj", "MatMul", 10, 20),
        event("model.layers.1.mlp.up_proj", "MatMul", 40, 40),
        event("Memcpy", "MemcpyToHost", 90, 6),
        {"cat": "Session", "name": "model_run", "ts": 20, "dur": 1000},
    ]
    phase = summarize_events(events, {f"model.layers.{n}.mlp.up_proj": "up_proj" for n in (0, 1)}, 10, 110, 2)
    assert phase["seconds"] == pytest.approx(50e-6)
    assert phase["operators"] == [
        {"name": "MatMul", "seconds": pytest.approx(30e-6), "calls": 1.0},
        {"name": "MemcpyToHost", "seconds": pytest.approx(3e-6), "calls": 0.5},
    ]
    assert [row["name"] for row in phase["roles"]] == ["up_proj", "copies between devices"]
    assert phase["copies"] == {"calls": 0.5, "seconds": pytest.approx(3e-6)}
    assert phase["outside_s"] == pytest.approx((100 - 66) / 2 * 1e-6)


def test_a_real_model_is_profiled_and_slowness_is_found(fp32_bundle: Path, tmp_path: Path, capsys: Any) -> None:
    copy = shutil.copytree(fp32_bundle, tmp_path / "copy")
    options = BenchOptions(
        prompt_tokens=300, output_tokens=6, rounds=2, warmup=0, threads=1, profile=True, price_per_hour=1.0
    )
    document = bench([fp32_bundle, copy], options)
    jsonschema.validate(json.loads(json.dumps(document)), read_schema())
    for row in document["rows"]:
        prefill, decode = row["profile"]["phases"]
        assert (prefill["phase"], prefill["unit"], decode["phase"], decode["unit"]) == (
            "prefill", "prompt", "decode", "token",
        )  # fmt: skip
        calls = {entry["name"]: entry["calls"] for entry in decode["operators"]}
        # Two layers; a token is one run, a prompt of 300 tokens two chunks of 256.
        assert calls["GroupQueryAttention"] == 2
        assert {entry["name"]: entry["calls"] for entry in prefill["operators"]}["GroupQueryAttention"] == 4
        assert {"down_proj", "qkv_proj", "attention", "norm"} <= {entry["name"] for entry in decode["roles"]}
        kernels = sum(entry["seconds"] for entry in decode["operators"])
        assert kernels + decode["outside_s"] == pytest.approx(decode["seconds"])
        assert row["roofline_share"] > 0
        tables = [layer for layer in row["layers"] if layer["role"] == "embedding"]
        assert row["bytes_per_token"] < sum(layer["bytes"] for layer in row["layers"]) * 2
        assert tables
    capsys.readouterr()
    print_document(document)
    printed = capsys.readouterr().out
    assert "decode, by operator" in printed
    assert "decode, by layer role" in printed
    assert "no copies between devices" in printed
    assert "MB are read for a token" in printed
    assert document["schema_version"] == bench_stage.SCHEMA_VERSION


def test_unpaired_ratios_are_oriented() -> None:
    slow, fast = [2.0, 2.1, 1.9, 2.0], [1.0, 1.1, 0.9, 1.0]
    low, high = unpaired_interval(slow, fast, False, 0, 0.95)
    assert 0.4 < low <= 0.5 <= high < 0.6
    low, high = unpaired_interval(slow, fast, True, 0, 0.95)
    assert 1.7 < low <= 2 <= high < 2.4
    assert unpaired_interval([1.0], fast, True, 0, 0.95) is None


def test_memory_that_is_free_is_read(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  5 kB\n")
    assert processes.available_memory(tmp_path / "meminfo") == 5 * 1024
    assert processes.available_memory(tmp_path / "none") is None


def test_processes_begin_anew_when_rounds_are_worth_it(stage: Stage, tmp_path: Path) -> None:
    for name in "ab":
        stage.add(name)
    models = [make_bundle(tmp_path, name) for name in "ab"]

    def take_time(name: str, method: str) -> None:
        stage.clock.now += {"facts": 5.0, "measure": 1.0}.get(method, 0.0)

    stage.fail = take_time
    document = bench(models, replace(QUICK, rounds=None, max_time=1e6), clock=stage.clock)
    # Two bundles open in 10 s and warm up in 5: 30 s of rounds, six of them, are worth a launch.
    opened = [number for number, (name, method) in enumerate(stage.calls) if (name, method) == ("a", "facts")]
    assert len(opened) == 2
    assert document["settings"]["rounds"] == 8
    # Two warm-ups: the round before all, and a run of the process that began anew.
    assert [name for name, method in stage.calls if method == "measure"].count("a") == 1 + 8 + 1
    assert len(document["rows"][0]["samples"]["tpot_s"]) == 8
    stage.calls.clear()
    bench(models, replace(QUICK, rounds=8), clock=stage.clock)
    assert [method for _, method in stage.calls].count("facts") == 2


def test_what_stays_with_a_process_widens_the_interval() -> None:
    random = np.random.default_rng(0)
    wrong = {"rounds": 0, "launches": 0}
    for _ in range(100):
        launches = np.repeat(np.arange(10), 4)
        ratios = list(np.exp(random.normal(0, 0.05, 10)[launches] + random.normal(0, 0.01, 40)))
        for key, interval in (
            ("rounds", safe_interval(ratios)),
            ("launches", launch_interval(ratios, list(launches))),
        ):
            wrong[key] += not interval[0] <= 1 <= interval[1]
    assert wrong["launches"] <= 7 < 20 <= wrong["rounds"]
    assert launch_interval([1.0, 1.1, 1.2], [0, 0, 1]) == safe_interval([1.0, 1.1, 1.2])


def test_models_of_different_tokenizers_compare_by_bits_per_byte(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        stage.add(name)
    write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in "ab"]
    manifest = json.loads((models[1] / "llmfast.json").read_text())
    tokenizer = json.loads((models[1] / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: len(words) - 1 - index for word, index in words.items()}
    (models[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    manifest["files"]["tokenizer.json"]["bytes"] = (models[1] / "tokenizer.json").stat().st_size
    (models[1] / "llmfast.json").write_text(json.dumps(manifest))
    theirs, ours = bench(models, replace(QUICK, data=tmp_path / "text"))["rows"]
    assert theirs["kld"] == 0.0
    assert [ours[key] for key in ("kld", "kld_p99", "top1_agreement", "perplexity_ratio", "same_answers")] == [None] * 5
    # Other words for the same ids: the same text is another path through the bigram model.
    assert 0 < ours["bits_per_byte"] != theirs["bits_per_byte"]
    err = capsys.readouterr().err
    assert "`b` has another tokenizer than `a`: there is no KL divergence between them" in err
    assert "not a finite number" not in err
