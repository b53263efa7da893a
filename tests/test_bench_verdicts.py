"""llmfast bench: what is better, worse or unsure; rounds, sweeps, gates, and failures of one bundle."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast.bench import processes, rounds
from llmfast.bench.document import read_schema
from llmfast.bench.options import BenchOptions, parse_numbers
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
from llmfast.bench.workload import plan
from llmfast.cli import app
from llmfast.errors import LlmfastError, NativeCrashError, OptionError
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
    document = bench(models, adaptive, clock=stage.clock).document()
    assert document["settings"]["rounds"] == 8  # no noise: the fewest suffice
    stage.fail = disturb
    document = bench(models, replace(adaptive, max_time=1000.0), clock=stage.clock).document()
    assert 8 < document["settings"]["rounds"] <= 1000 / 10  # a round takes 10 s
    assert document["rows"][1]["verdict"]["decode_tokens_per_s"] == "inconclusive"
    assert bench(models, replace(adaptive, max_time=0.0), clock=stage.clock).document()["settings"]["rounds"] == 8
    assert bench(models, replace(QUICK, rounds=11), clock=stage.clock).document()["settings"]["rounds"] == 11


def test_rounds_end(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "MOST_ROUNDS", 12)
    stage.add("a")

    def slow_down(name: str, method: str) -> None:
        stage.engines["a"].decode_s *= 2 if method == "measure" else 1

    stage.fail = slow_down
    document = bench([make_bundle(tmp_path, "a")], replace(QUICK, rounds=None), clock=lambda: 0.0).document()
    assert document["settings"]["rounds"] == 12


def test_verdicts_of_a_row(stage: Stage, tmp_path: Path) -> None:
    stage.add("base", table=make_table(0))
    stage.add("fast", prefill_s=0.25, decode_s=0.5, table=make_table(0) + make_table(1))
    write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in ("base", "fast")]
    base, fast = bench(models, replace(QUICK, rounds=8, data=tmp_path / "text")).document()["rows"]
    assert base["verdict"] == {}
    speeds = ("prefill_tokens_per_s", "ttft_s", "decode_tokens_per_s", "tpot_s")
    assert [fast["verdict"][key] for key in speeds] == ["better", "better", "worse", "worse"]
    assert fast["perplexity_change"] == pytest.approx(fast["perplexity"] - base["perplexity"])
    low, high = fast["perplexity_change_spread"]
    assert low <= fast["perplexity_change"] <= high
    assert fast["verdict"]["perplexity"] == ("worse" if low > 0 else "inconclusive")
    same = bench([models[0], models[0]], replace(QUICK, rounds=8, data=tmp_path / "text")).document()["rows"][1]
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
    document = bench([make_bundle(tmp_path, "a")], replace(QUICK, prompt_tokens=(4, 8), gates=())).document()
    row = document["rows"][0]
    assert (row["prefill_tokens_per_s_1x4"], row["prefill_tokens_per_s_1x8"]) == (8.0, 16.0)
    assert "prefill_tokens_per_s" not in row
    assert document["settings"]["prompt_tokens"] == [4, 8]
    gate = Gate("tpot_s_ratio", 0.5, "min")
    document = bench([make_bundle(tmp_path / "x", "a")], replace(QUICK, prompt_tokens=(4, 8), gates=(gate,))).document()
    assert [entry["figure"] for entry in document["verdict"]] == ["tpot_s_1x4_ratio", "tpot_s_1x8_ratio"]


def test_a_sweep_over_threads_has_a_row_for_each(stage: Stage, tmp_path: Path) -> None:
    stage.add("a")
    document = bench([make_bundle(tmp_path, "a")], replace(QUICK, threads=(1, 2))).document()
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
    assert plan("text-generation", BenchOptions(prompt_tokens=4, batch=(1, 8)), []).shapes == {
        "1x4": (1, 4),
        "8x4": (8, 4),
    }
    assert plan("text-generation", BenchOptions(shapes="2x16,4x8"), []).shapes == {"2x16": (2, 16), "4x8": (4, 8)}
    with pytest.raises(OptionError, match="--batch 8: models for translation are measured one sequence at a time"):
        plan("translation", BenchOptions(batch=(1, 8)), [])
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
    verdicts = {entry["figure"]: entry["verdict"] for entry in bench(models, options).document()["verdict"]}
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
    document = bench(models, replace(QUICK, data=tmp_path / "text", gates=(Gate("kld", 9, "max"),))).document()
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
    expected = bench(models, options).document()["rows"]
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
    rows = bench(models, options).document()["rows"]
    assert most[0] <= 2  # the baseline and one candidate, while quality is measured
    assert "each is opened for its turn only" in capsys.readouterr().err
    for row, other in zip(rows, expected, strict=True):
        for key in ("kld", "perplexity", "decode_tokens_per_s", "prefill_tokens_per_s"):
            assert row[key] == other[key]
        assert len(row["samples"]["tpot_s"]) == QUICK.rounds
        assert row["size_bytes"] == other["size_bytes"]


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
    document = bench(models, replace(QUICK, rounds=None, max_time=1e6), clock=stage.clock).document()
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
    theirs, ours = bench(models, replace(QUICK, data=tmp_path / "text")).document()["rows"]
    assert theirs["kld"] == 0.0
    assert [ours[key] for key in ("kld", "kld_p99", "top1_agreement", "perplexity_ratio", "same_answers")] == [None] * 5
    # Other words for the same ids: the same text is another path through the bigram model.
    assert 0 < ours["bits_per_byte"] != theirs["bits_per_byte"]
    err = capsys.readouterr().err
    assert "`b` has another tokenizer than `a`: there is no KL divergence between them" in err
    assert "not a finite number" not in err
