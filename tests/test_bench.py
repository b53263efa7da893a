"""llmfast bench: arithmetic with a fake clock, quality against NumPy, forms of the document, and bad input."""

import csv
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfast import registry
from llmfast.bench.options import BenchOptions
from llmfast.bench.rounds import rotated
from llmfast.bench.stage import bench, print_document
from llmfast.errors import InputError, NativeCrashError, OptionError, ResourceError
from tests.fake_bench import Stage, make_stage
from tests.tiny_bench import QUICK, VOCAB, make_bundle, make_table, reference_figures, write_text

METRICS = registry.names("bench.metrics")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return make_stage(monkeypatch)


# Arithmetic


def test_figures_and_ratios_are_exact(stage: Stage, tmp_path: Path) -> None:
    stage.add("slow", prefill_s=0.5, decode_s=0.25)
    stage.add("fast", prefill_s=0.25, decode_s=0.0625)
    document = bench([make_bundle(tmp_path, "slow"), make_bundle(tmp_path, "fast")], QUICK).document()
    slow, fast = document["rows"]
    assert document["baseline"] == "slow"
    assert (slow["ttft_s"], slow["prefill_tokens_per_s"]) == (0.5, 16.0)
    assert (slow["tpot_s"], slow["decode_tokens_per_s"]) == (0.25, 4.0)
    assert (fast["ttft_s"], fast["prefill_tokens_per_s"]) == (0.25, 32.0)
    assert (fast["itl_p50_s"], fast["itl_p95_s"]) == (0.0625, 0.0625)
    assert slow["prefill_tokens_per_s_ratio"] == slow["ttft_s_ratio"] == 1.0
    assert fast["prefill_tokens_per_s_ratio"] == fast["ttft_s_ratio"] == 2.0
    assert fast["decode_tokens_per_s_ratio"] == fast["tpot_s_ratio"] == 4.0
    assert fast["decode_tokens_per_s_ratio_spread"] == [4.0, 4.0]
    assert fast["decode_tokens_per_s_spread"] == [16.0, 16.0]
    assert fast["samples"]["tpot_s"] == [0.0625] * QUICK.rounds


def test_every_bundle_takes_its_turn_in_every_round_and_the_order_rotates(stage: Stage, tmp_path: Path) -> None:
    for name in "abc":
        stage.add(name)
    bench([make_bundle(tmp_path, name) for name in "abc"], QUICK)
    turns = "".join(name for name, method in stage.calls if method == "measure")
    assert turns == "abc" + "bca" + "cab" + "abc"
    assert rotated([1, 2, 3], 4) == [2, 3, 1]


def test_ids_are_shared_in_a_round_and_change_with_round_and_seed(stage: Stage, tmp_path: Path) -> None:
    stage.add("a")
    stage.add("b")
    models = [make_bundle(tmp_path, name) for name in "ab"]
    bench(models, QUICK)
    first = stage.engines["a"].prompts
    assert first == stage.engines["b"].prompts
    count = len(first)
    assert count == QUICK.warmup + QUICK.rounds
    assert len({tuple(prompt) for prompt in first}) == count
    bench(models, replace(QUICK, seed=1))
    assert stage.engines["a"].prompts[count] != first[0]


def test_peak_memory_is_read_between_speed_and_quality(stage: Stage, tmp_path: Path) -> None:
    stage.add("a")
    write_text(tmp_path / "text")
    bench([make_bundle(tmp_path, "a")], replace(QUICK, data=tmp_path / "text"))
    methods = [method for _, method in stage.calls]
    assert methods == ["facts"] + ["measure"] * 4 + ["describe"] + ["compare"] * 6  # windows and greedy prompts


# Quality


def test_divergence_matches_the_plain_formulas(stage: Stage, tmp_path: Path) -> None:
    base, ours = make_table(0), make_table(0) + make_table(1) / 4
    stage.add("base", table=base)
    stage.add("ours", table=ours)
    ids = write_text(tmp_path / "text")[: 3 * 6].reshape(3, 6)
    options = replace(QUICK, data=tmp_path / "text")
    document = bench([make_bundle(tmp_path, "base"), make_bundle(tmp_path, "ours")], options).document()
    same, moved = document["rows"]
    expected = reference_figures(base, ours, ids)
    assert {key: moved[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert (same["kld"], same["top1_agreement"], same["perplexity_ratio"]) == (0.0, 1.0, 1.0)
    low, high = moved["kld_spread"]
    assert low <= moved["kld"] <= high
    assert len(moved["samples"]["kld"]) == 3
    assert np.mean(moved["samples"]["kld"]) == pytest.approx(moved["kld"])
    assert document["settings"]["data"]["windows"] == document["settings"]["data"]["prompts"] == 3


def test_answers_that_are_not_finite_become_none_with_a_note(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.add("base")
    stage.add("broken", table=np.full((VOCAB, VOCAB), np.nan, np.float32))
    write_text(tmp_path / "text")
    options = replace(QUICK, data=tmp_path / "text")
    document = bench([make_bundle(tmp_path, "base"), make_bundle(tmp_path, "broken")], options).document()
    assert document["rows"][1]["kld"] is None
    assert document["rows"][1]["kld_spread"] is None
    assert "`broken` has no kld: it is not a finite number" in capsys.readouterr().err
    json.dumps(document, allow_nan=False)


# The document


@pytest.fixture
def document(stage: Stage, tmp_path: Path) -> dict[str, Any]:
    stage.add("base")
    stage.add("fa|st", prefill_s=0.125, decode_s=0.25, table=make_table(0) + make_table(1) / 4)
    write_text(tmp_path / "text.txt")
    models = [make_bundle(tmp_path, "base"), make_bundle(tmp_path, "fa|st")]
    return bench(models, replace(QUICK, data=tmp_path / "text.txt")).document()


def test_json_round_trips_without_nan(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_document(document, "json")
    printed = capsys.readouterr().out
    assert json.loads(printed) == document
    assert "NaN" not in printed
    assert list(document) == ["schema_version", "machine", "settings", "warnings", "baseline", "rows", "verdict"]
    assert document["settings"]["data"]["name"] == "text.txt"
    assert document["rows"][0]["placement"] == {"CPUExecutionProvider": 3}


def test_every_measured_figure_has_its_spread(document: dict[str, Any]) -> None:
    for name in METRICS:
        plugin = registry.load("bench.metrics", name)
        keys = [key.format(case="") for key in plugin.HIGHER_IS_BETTER if "{shape}" not in key and "price" not in key]
        for key in keys if plugin.KIND != "static" else []:
            for row in document["rows"] if "text-generation" in plugin.TASKS else []:
                low, high = row[f"{key}_spread"]
                assert low <= row[key] <= high
                assert len(row["samples"][key]) >= 1


def test_markdown_is_a_table_and_a_footer(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_document(document, "md")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["### llmfast bench: no gates", ""]
    assert lines[2].startswith(
        "| bundle | MB | bits/weight | load s | peak MB | TTFT ms | prefill tok/s | x | TPOT ms | decode tok/s | x |"
    )
    assert "| KLD | KLD p99 | top-1 % | ppl x | bits/byte |" in lines[2]
    assert lines[3].startswith("|---|--:|")
    assert lines[5].startswith("| fa\\|st |")
    assert "| 64 | 4.00 |" in lines[5]
    assert lines[6] == ""
    assert lines[8].startswith("- onnxruntime")
    assert "8 prompt and 5 output tokens; medians of 3 interleaved rounds, x against `base`" in lines[9]


def test_csv_has_a_line_per_bundle_and_no_lists(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_document(document, "csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["bundle"] for row in rows] == ["base", "fa|st"]
    assert float(rows[1]["prefill_tokens_per_s_ratio"]) == 4.0
    assert float(rows[1]["ttft_s_low"]) == 0.125
    assert "samples" not in rows[0]
    assert not any("[" in value for row in rows for value in row.values())


def test_table_is_for_people(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_document(document)
    printed = capsys.readouterr().out
    assert "decode tok/s" in printed
    assert "quality on `text.txt`" in printed


def test_a_ratio_that_shows_no_difference_is_marked(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    document["rows"][1]["decode_tokens_per_s_ratio"] = 1.02
    document["rows"][1]["verdict"] |= {"decode_tokens_per_s": "inconclusive", "prefill_tokens_per_s": "equal"}
    print_document(document, "md")
    printed = capsys.readouterr().out
    assert "| ~1.02 |" in printed
    assert "| =4.00 |" in printed
    assert "~ inconclusive: the noise is larger than the difference" in printed
    assert "= equal within 2 %" in printed


def test_unknown_format_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="unknown format `xml`"):
        print_document(document, "xml")


def test_columns_are_repeated_for_every_shape(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"latency_s_1x2": 0.5, "samples_per_s_1x2": 2.0, "latency_s_4x2": 0.25, "samples_per_s_4x2": 16.0}
    rows = [{"bundle": "encoder", "energy_source": None, "verdict": {}} | figures]
    print_document(document | {"rows": rows, "settings": document["settings"] | {"shapes": ["1x2", "4x2"]}}, "md")
    header = capsys.readouterr().out.splitlines()[2]
    assert header == "| bundle | 1x2 ms | 1x2 samples/s | 4x2 ms | 4x2 samples/s |"


# Baselines, names, what can't be measured


def test_a_named_baseline_is_added_once(stage: Stage, tmp_path: Path) -> None:
    for name in "ab":
        stage.add(name)
    first, second = (make_bundle(tmp_path, name) for name in "ab")
    document = bench([first], QUICK, baseline=second).document()
    assert (document["baseline"], [row["bundle"] for row in document["rows"]]) == ("b", ["b", "a"])
    document = bench([first, second], QUICK, baseline=tmp_path / "a" / ".." / "b").document()
    assert (document["baseline"], [row["bundle"] for row in document["rows"]]) == ("b", ["a", "b"])


def test_labels_are_unique(stage: Stage, tmp_path: Path) -> None:
    stage.add("model")
    one, two = make_bundle(tmp_path / "one", "model"), make_bundle(tmp_path / "two", "model")
    document = bench([one, two, two], QUICK).document()
    assert [row["bundle"] for row in document["rows"]] == [str(one), str(two), f"{two} (2)"]


def test_unknown_task_has_none_cells_and_a_note(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.add("known")
    stage.add("foreign")
    stage.engines["foreign"].vocab_size = None  # type: ignore[assignment]
    document = bench([make_bundle(tmp_path, "known"), make_bundle(tmp_path, "foreign", "unknown")], QUICK).document()
    row = document["rows"][1]
    assert row["decode_tokens_per_s"] is None
    assert row["decode_tokens_per_s_ratio"] is None
    assert row["size_bytes"] > 0
    assert "`foreign` has no decode figures: its task is unknown" in capsys.readouterr().err


def test_without_data_a_note_says_how_to_get_quality(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.add("a")
    document = bench([make_bundle(tmp_path, "a")], QUICK).document()
    assert "kld" not in document["rows"][0]
    captured = capsys.readouterr()
    assert "speed only; for quality give --data FILE" in captured.err
    assert captured.out == ""


def test_noise_is_noted_and_a_load_of_the_past_is_not(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))  # of what has ended
    monkeypatch.setattr("llmfast.bench.watch._others", lambda *_: 0.02)
    stage.add("a")

    def slow_down(name: str, method: str) -> None:
        stage.engines["a"].decode_s *= 2 if method == "measure" else 1

    stage.fail = slow_down
    bench([make_bundle(tmp_path, "a")], QUICK)
    err = capsys.readouterr().err
    assert "busy" not in err
    assert "`a` is noisy (tpot_s ±" in err
    assert "ttft_s" not in err


# Bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens 0"),
        ({"output_tokens": 1}, "--output-tokens 1: must be at least 2"),
        ({"rounds": 0}, "--rounds 0"),
        ({"warmup": -1}, "--warmup -1"),
        ({"num_samples": 0}, "--num-samples 0"),
        ({"seq_len": 1}, "--seq-len 1"),
        ({"seed": -1}, "--seed -1"),
        ({"shapes": "8x128,"}, "--shapes: ``"),
        ({"shapes": "0x128"}, "--shapes: `0x128`"),
        ({"shapes": "8*128"}, "--shapes: `8\\*128`"),
    ],
)
def test_impossible_options_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BenchOptions(**changed)


def test_no_model_is_refused() -> None:
    with pytest.raises(OptionError, match="no model"):
        bench([], QUICK)


def test_missing_model_is_refused(stage: Stage, tmp_path: Path) -> None:
    stage.add("a")
    with pytest.raises(InputError, match=r"not found: `.*nowhere`"):
        bench([make_bundle(tmp_path, "a"), tmp_path / "nowhere"], QUICK)
    assert stage.calls == []


def test_different_tasks_are_refused(tmp_path: Path) -> None:
    models = [make_bundle(tmp_path, "a"), make_bundle(tmp_path, "b", "text-classification")]
    with pytest.raises(InputError, match="`a` is text-generation, `b` is text-classification"):
        bench(models, QUICK)


@pytest.mark.parametrize(("content", "message"), [("", "no text"), ("w1 w2", "too short"), (None, "not found")])
def test_unusable_data_is_refused_before_anything_runs(
    stage: Stage, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_text(content)
    with pytest.raises(InputError, match=message):
        bench([make_bundle(tmp_path, "a")], replace(QUICK, data=tmp_path / "text"))
    assert stage.calls == []


def test_too_long_for_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="13 tokens, `a` holds 12"):
        bench([make_bundle(tmp_path, "a", context=12)], QUICK)


def test_another_vocabulary_is_refused_when_quality_is_asked_for(stage: Stage, tmp_path: Path) -> None:
    stage.add("a")
    stage.add("b", table=make_table(1, VOCAB + 3))
    models = [make_bundle(tmp_path, "a"), make_bundle(tmp_path, "b")]
    assert len(bench(models, QUICK).document()["rows"]) == 2
    write_text(tmp_path / "text")
    with pytest.raises(InputError, match="`b` has 20 token ids, `a` has 17"):
        bench(models, replace(QUICK, data=tmp_path / "text"))


def test_a_crash_of_the_baseline_names_it_and_closes_the_others(stage: Stage, tmp_path: Path) -> None:
    for name in "ab":
        stage.add(name)

    def crash(name: str, method: str) -> None:
        if (name, method) == ("b", "measure"):
            raise NativeCrashError("worker crashed with SIGSEGV", "the model may be malformed")

    stage.fail = crash
    with pytest.raises(NativeCrashError, match="`b`: worker crashed with SIGSEGV"):
        bench([make_bundle(tmp_path, name) for name in "ba"], QUICK)
    assert sorted(stage.closed) == ["a", "b"]


def test_ctrl_c_leaves_no_temporary_file(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        stage.add(name)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def interrupt(name: str, method: str) -> None:
        if (name, method) == ("b", "compare"):
            assert list(scratch.glob("*/reference.npy"))
            raise KeyboardInterrupt

    stage.fail = interrupt
    write_text(tmp_path / "text")
    with pytest.raises(KeyboardInterrupt):
        bench([make_bundle(tmp_path, name) for name in "ab"], replace(QUICK, data=tmp_path / "text"))
    assert list(scratch.iterdir()) == []


def test_a_full_disk_is_a_lack_of_resources(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, array: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    stage.add("a")
    monkeypatch.setattr(np, "save", full)
    write_text(tmp_path / "text")
    with pytest.raises(ResourceError, match="`a`: cannot write 408 bytes"):
        bench([make_bundle(tmp_path, "a")], replace(QUICK, data=tmp_path / "text"))
