"""Bundles: written whole or not at all, read with checks."""

import json
from pathlib import Path

import pytest

from llmfast.bundle import (
    Manifest,
    ModelBundle,
    Step,
    check_output,
    sha256,
    stage_output,
    write_manifest,
)
from llmfast.errors import InputError, OptionError, OutputExistsError, ResourceError

MANIFEST = Manifest(
    "text-generation",
    graphs={"model": {"file": "model.onnx", "inputs": ["x"], "outputs": ["y"]}},
    lineage=(Step("export", "direct", {"threads": None}, {"onnx": "1"}),),
)


def _write(output: Path, content: bytes = b"graph", overwrite: bool = False) -> None:
    with stage_output(output, overwrite) as staged:
        (staged / "model.onnx").write_bytes(content)
        write_manifest(staged, MANIFEST)


def test_manifest_comes_back_as_written(tmp_path: Path) -> None:
    _write(tmp_path / "bundle")
    bundle = ModelBundle.open(tmp_path / "bundle")
    assert bundle.manifest.lineage == MANIFEST.lineage
    assert bundle.manifest.graphs == MANIFEST.graphs
    assert bundle.manifest.files == {"model.onnx": {"sha256": sha256(bundle.model), "bytes": 5}}
    assert (bundle.size_bytes, bundle.name) == (5, "bundle")


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), stage_output(tmp_path / "bundle", False) as staged:
        (staged / "model.onnx").write_bytes(b"half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_what_was_there(tmp_path: Path) -> None:
    _write(tmp_path / "bundle", b"old")
    with pytest.raises(ValueError, match="x"), stage_output(tmp_path / "bundle", True) as staged:
        (staged / "model.onnx").write_bytes(b"half")
        raise ValueError("x")
    assert ModelBundle.open(tmp_path / "bundle").model.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_overwrite_replaces_a_bundle(tmp_path: Path) -> None:
    _write(tmp_path / "bundle", b"old")
    with pytest.raises(OutputExistsError):
        _write(tmp_path / "bundle", b"new")
    _write(tmp_path / "bundle", b"new", overwrite=True)
    assert ModelBundle.open(tmp_path / "bundle").model.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(OutputExistsError, match="not an llmfast bundle"):
        check_output(precious, (), overwrite=True)


@pytest.mark.parametrize("output", ["source", "source/inside", "."])
def test_output_may_not_touch_its_input(tmp_path: Path, output: str) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(OptionError, match="overlaps"):
        check_output(tmp_path / output, (tmp_path / "source",), overwrite=True)


def test_unwritable_place_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"), stage_output(tmp_path / "file" / "bundle", False):
        pass


def test_missing_and_changed_files_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "bundle")
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"grap")
    with pytest.raises(InputError, match="has 4 bytes, its manifest says 5"):
        ModelBundle.open(tmp_path / "bundle")
    (tmp_path / "bundle" / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"lacks `model\.onnx`"):
        ModelBundle.open(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 99}, "format 99"),
        ({"format": 99, "task": 7, "novelty": 1}, "format 99"),  # another format has other fields
        ({"graphs": {"model": {"file": "../model.onnx"}}}, "leaves the bundle"),
        ({"graphs": {}}, "there is no graph"),
        ({"graphs": {"../model": {"file": "model.onnx"}}}, "not named after its role"),
        ({"files": {}}, "lacks a graph's file"),
        ({"files": []}, "`files` is of type list"),
        ({"files": {"model.onnx": None}}, "how many bytes"),
        ({"task": None}, "`task` is of type NoneType"),
        ({"task": "telepathy"}, "unknown task `telepathy`"),
        ({"bits_per_weight": "a"}, "`bits_per_weight` is of type str"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_malformed_manifests_are_refused(tmp_path: Path, change: dict, reason: str) -> None:
    _write(tmp_path / "bundle")
    path = tmp_path / "bundle" / "llmfast.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=reason):
        ModelBundle.open(tmp_path / "bundle")


def test_missing_models_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        ModelBundle.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no model in"):
        ModelBundle.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError) as failure:
        ModelBundle.open(tmp_path)
    assert "llmfast export" in failure.value.hint


def test_lone_onnx_file_is_a_model_of_unknown_task(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"123")
    (tmp_path / "net.onnx.data").write_bytes(b"4567")
    bundle = ModelBundle.open(tmp_path / "net.onnx")
    assert (bundle.name, bundle.size_bytes, bundle.manifest.task) == ("net.onnx", 7, "unknown")
