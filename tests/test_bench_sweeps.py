"""llmfast bench: sweeps over lengths, batches and threads, and the lengths that fit a context."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmfast.bench.options import BenchOptions, parse_numbers
from llmfast.bench.stage import bench
from llmfast.bench.workload import plan
from llmfast.errors import OptionError
from llmfast.verdict import Gate
from tests.fake_bench import Stage, make_stage
from tests.tiny_bench import QUICK, make_bundle


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return make_stage(monkeypatch)


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
