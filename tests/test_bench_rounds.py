"""llmfast bench: how many rounds there are, and what becomes of them when a bundle fails or memory is short."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast.bench import processes, rounds
from llmfast.bench.document import read_schema
from llmfast.bench.stage import bench, print_document
from llmfast.cli import app
from llmfast.errors import NativeCrashError
from llmfast.verdict import Gate
from tests.fake_bench import Stage, make_stage
from tests.tiny_bench import QUICK, make_bundle, make_table, write_text


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return make_stage(monkeypatch)


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
    document = bench([tmp_path / "a"], replace(QUICK, rounds=13), clock=lambda: 0.0).document()
    assert document["settings"]["rounds"] == 13, "as many as were asked for"


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
