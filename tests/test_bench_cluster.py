"""A sweep of bundles over the nodes of a Ray cluster, one of which dies."""

import os
import re
import shutil
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast.bench import cluster as cluster_bench
from llmfast.bench.cluster import bench_on_cluster
from llmfast.bench.comparison import compare_documents
from llmfast.bench.contestant import Contestant
from llmfast.bench.document import read_schema
from llmfast.bench.options import BenchOptions
from llmfast.bench.result import Benchmark, make_row
from llmfast.bench.stage import bench
from llmfast.bench.table import print_document
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, NativeCrashError, OptionError, UnsupportedError
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.verdict import Gate
from tests.ray_cluster import Asked, Asking, Cluster
from tests.tiny_bench import QUICK


def _bundles(fp32_bundle: Path, folder: Path) -> list[Path]:
    small = QuantizeOptions("int8", measure=False)
    return [fp32_bundle, *(quantize(fp32_bundle, folder / name, small).path for name in ("a", "b", "c"))]


def test_a_sweep_is_measured_beside_its_baseline_on_each_node(
    cluster: Cluster, fp32_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the dog lay beside it. " * 20)
    models = _bundles(fp32_bundle, tmp_path)
    options = replace(QUICK, shapes=None, data=tmp_path / "text.txt", gates=(Gate("kld", 1.0, "max"),))
    document = bench_on_cluster(models, options, address=cluster.address).document()
    jsonschema.validate(document, read_schema())
    host = socket.gethostname()
    assert [(row["bundle"], row["node"]) for row in document["rows"]] == [
        (name, node) for node, names in ((host, ("fp32", "a", "c")), (f"{host} (2)", ("fp32", "b"))) for name in names
    ]
    assert list(document["nodes"]) == [host, f"{host} (2)"]
    assert [(entry["bundle"], entry["passed"]) for entry in document["verdict"]] == [
        ("a", True),
        ("c", True),
        ("b", True),
    ]
    baselines = {row["node"]: row["samples"] for row in document["rows"] if row["bundle"] == "fp32"}
    key = "decode_tokens_per_s"
    for row in document["rows"]:
        assert row["processor"] == document["nodes"][row["node"]]["cpu"]
        ratios = np.divide(row["samples"][key], baselines[row["node"]][key])
        assert row[f"{key}_ratio"] == pytest.approx(np.median(ratios))
    local = bench(models[:2], options).document()
    assert [row["kld"] for row in document["rows"][:2]] == [row["kld"] for row in local["rows"]]
    print_document(document)
    shown = capsys.readouterr().out
    assert re.search(rf"fp32 +{re.escape(host)} \(2\) ", shown)
    assert f"{host} (2): {local['machine']['cpu']}" in shown
    assert compare_documents(document, document, ("old", "new"))["rows"][0]["basis"] == "raw"
    assert {row["ratio"] for row in compare_documents(document, document, ("x", "y"))["rows"]} <= {1.0, None}


def _measure_or_die(models: dict[str, Path], options: BenchOptions) -> tuple[Benchmark, str]:
    """Stand in for a run; the first one that has `b` dies."""
    mark = models["fp32"].parent / "died"
    if "b" in models and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    rows = [make_row(Contestant(name, path, ModelBundle.open(path))) for name, path in models.items()]
    return Benchmark({"cpu": "x"}, {"rounds": len(models)}, ["busy"], "fp32", rows, []), "note: from there\n"


def test_a_run_that_dies_is_done_on_another_node(
    cluster: Cluster, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cluster_bench, "measure", _measure_or_die)
    shutil.copytree(fp32_bundle, tmp_path / "fp32")
    models = [tmp_path / "fp32", *_bundles(fp32_bundle, tmp_path)[1:]]
    document = bench_on_cluster(models, QUICK, address=cluster.address).document()
    assert sorted(row["bundle"] for row in document["rows"]) == ["a", "b", "c", "fp32", "fp32"]
    assert len(document["nodes"]) == 2
    assert document["settings"]["rounds"] == 2
    notes = capsys.readouterr().err
    assert "died: another node measures fp32, b" in notes
    assert ": note: from there" in notes
    (tmp_path / "died").unlink()
    with pytest.raises(NativeCrashError, match="no other node is left"):
        bench_on_cluster(models[::2], QUICK, models[0], cluster.address, workers=1)


def test_a_node_with_another_model_is_found(
    cluster: Cluster, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_bench, "measure", _measure_or_die)
    monkeypatch.setattr(cluster_bench, "hash_model", lambda bundle: {"model.onnx": "0" * 64})
    with pytest.raises(InputError, match="`fp32` is another model on"):
        bench_on_cluster([fp32_bundle], QUICK, address=cluster.address)


@pytest.mark.parametrize(
    ("provider", "gpus", "asked"), [("cuda", 2, 2), ("cpu,tensorrt", 1, 1), ("cuda", 0, 0), ("cpu", 2, None)]
)
def test_a_run_asks_for_the_gpus_of_its_node(
    provider: str, gpus: int, asked: int | None, fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'llmfast[ray]'")
    monkeypatch.setattr(cluster_bench, "connect", lambda _: Asking(gpus))
    with pytest.raises(Asked) as caught:
        bench_on_cluster([fp32_bundle], replace(QUICK, provider=provider))
    assert (caught.value.args[0]["num_cpus"], caught.value.args[0].get("num_gpus")) == (2, asked)


def test_a_sweep_without_ray_says_what_to_install(fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match="`ray`") as refusal:
        bench_on_cluster([fp32_bundle], QUICK)
    assert refusal.value.hint == "pip install 'llmfast[ray]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "spark"], "choose from: local, ray"),
        (["--workers", "2"], "--workers is for --engine ray"),
        (["--engine", "ray", "--workers", "0"], "--workers 0: must be at least 1"),
        (["--engine", "ray", "--compare"], "--engine ray does not go with --compare"),
        (["--engine", "ray", "--tune-session"], "--engine ray does not go with --tune-session"),
    ],
)
def test_bench_refuses_options_of_the_other_engine(arguments: list[str], message: str, fp32_bundle: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(fp32_bundle), *arguments])
    assert result.exit_code == OptionError.exit_code
    assert message in result.output + result.stderr
