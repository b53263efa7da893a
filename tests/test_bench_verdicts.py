"""llmfast bench: what is better, worse or unsure, and which gates that keeps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import Sequence, Split

from llmfast.bench.stage import bench
from llmfast.errors import LlmfastError, OptionError
from llmfast.verdict import Gate, enforce, judge, parse_drop, parse_speedup, spell
from tests.fake_bench import Stage, make_stage
from tests.tiny_bench import QUICK, VOCAB, make_bundle, make_table, write_text


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return make_stage(monkeypatch)


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


def _reverse_vocabulary(model: Path, pre_tokenizer: Any = None) -> None:
    """Give a bundle another tokenizer: the same words, their ids from last to first, perhaps cut elsewhere."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: len(words) - 1 - index for word, index in words.items()}
    backend = Backend.from_str(json.dumps(tokenizer))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.save(str(model / "tokenizer.json"))
    manifest = json.loads((model / "llmfast.json").read_text())
    manifest["files"]["tokenizer.json"]["bytes"] = (model / "tokenizer.json").stat().st_size
    (model / "llmfast.json").write_text(json.dumps(manifest))


def test_models_of_different_tokenizers_compare_by_bits_per_byte(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        stage.add(name)
    write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in "ab"]
    _reverse_vocabulary(models[1])
    theirs, ours = bench(models, replace(QUICK, data=tmp_path / "text")).document()["rows"]
    assert theirs["kld"] == 0.0
    assert [ours[key] for key in ("kld", "kld_p99", "top1_agreement", "perplexity_ratio", "same_answers")] == [None] * 5
    # Other words for the same ids: the same text is another path through the bigram model.
    assert 0 < ours["bits_per_byte"] != theirs["bits_per_byte"]
    err = capsys.readouterr().err
    assert "`b` has another tokenizer than `a`: there is no KL divergence between them" in err
    assert "not a finite number" not in err


def test_a_tokenizer_with_more_tokens_for_the_text_has_room_for_them(stage: Stage, tmp_path: Path) -> None:
    for name in "ab":
        stage.add(name)
    ids = write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in "ab"]
    _reverse_vocabulary(models[1], Sequence([Split(" ", "removed"), Split(Regex("[0-9]"), "isolated")]))
    options = replace(QUICK, data=tmp_path / "text", prompt_tokens=2, output_tokens=2)
    _, ours = bench(models, options).document()["rows"]
    assert ours["kld"] is None
    # `w12` becomes three tokens that it does not know, all `w0`; the text of the first one is given.
    logits = make_table(0).astype(np.float64)[VOCAB - 1]
    loss = np.log(np.exp(logits).sum()) - logits[VOCAB - 1]
    words = [[f"w{token}" for token in window[1:]] for window in np.split(ids[:18], 3)]
    tokens = sum(sum(map(len, window)) - 1 for window in words)
    size = sum(len(" ".join(window)) - 1 for window in words)
    assert ours["bits_per_byte"] == pytest.approx(tokens * loss / np.log(2) / size)
