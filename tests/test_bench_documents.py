"""llmfast bench: documents, what CI reads of them, and their comparison over time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast.bench.comparison import compare_documents
from llmfast.bench.document import load_document, read_schema, save_document
from llmfast.bench.junit import to_junit
from llmfast.bench.stage import bench, print_document
from llmfast.bench.statistics import (
    median,
)
from llmfast.cli import app
from llmfast.errors import InputError, OptionError
from llmfast.verdict import Gate
from tests.fake_bench import Stage, make_stage
from tests.tiny_bench import QUICK, make_bundle, make_table, write_text


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return make_stage(monkeypatch)


@pytest.fixture
def document(stage: Stage, tmp_path: Path) -> dict[str, Any]:
    stage.add("base")
    stage.add("x", prefill_s=0.25, decode_s=0.125, table=make_table(0) + make_table(1) / 4)
    write_text(tmp_path / "text")
    models = [make_bundle(tmp_path, name) for name in ("base", "x")]
    options = replace(QUICK, rounds=8, data=tmp_path / "text", gates=(Gate("kld", 1e-9, "max"),), price_per_hour=3.6)
    return bench(models, options).document()


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


@pytest.mark.parametrize(
    ("option", "value"),
    [("--prompt-tokens", "128"), ("--rounds", "5"), ("--warmup", "0"), ("--baseline", "x"), ("--provider", "cuda")]
    + [(flag, None) for flag in ("--verify", "--profile", "--no-tuned", "--tune-session")],
)
def test_a_comparison_refuses_what_is_for_runs(option: str, value: str | None) -> None:
    arguments = [option, value] if value else [option]
    result = CliRunner().invoke(app, ["bench", "--compare", "old.json", "new.json", *arguments])
    assert result.exit_code == 2
    assert f"--compare has no use for {option}" in result.stderr


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
