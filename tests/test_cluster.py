"""Files of prompts over workers: each alone, then on a Ray cluster of two nodes, one of which dies."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, NativeCrashError, OptionError, OutputExistsError, UnsupportedError
from llmfast.infer.cluster import pool as pool_module
from llmfast.infer.cluster.parts import Part, PartFolder
from llmfast.infer.cluster.pool import Plan, Pool, plan_workers
from llmfast.infer.cluster.run import ClusterOptions, answer_folder
from llmfast.infer.cluster.source import find_source
from llmfast.infer.cluster.worker import LineWorker
from llmfast.infer.jsonl import Line
from llmfast.infer.many import Summary, answer_file, settings_digest
from tests.ray_cluster import Asked, Asking, Cluster

TWO = ClusterOptions(workers=2, threads=1, part_lines=16)


def _write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def _prompts(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": number, "prompt": f"{'ab' * (number % 7)} {number}", "max_new_tokens": 5 + number * 7 % 40}
        for number in range(first, first + count)
    ]


def _answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.open(encoding="utf-8")]


def _without_keys(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "key"} for record in records]


def _locally(bundle: Path, lines: list[dict[str, Any]], folder: Path, **options: Any) -> list[dict[str, Any]]:
    output = folder / "local.jsonl"
    answer_file(bundle, _write(folder / "all.jsonl", lines), output, threads=1, overwrite=True, **options)
    return [json.loads(line) for line in output.open(encoding="utf-8")]


def _worker(bundle: Path, **options: Any) -> LineWorker:
    digest = settings_digest(ModelBundle.open(bundle), options)
    return LineWorker(bundle, digest, "cpu", 1, 4, 1, options)


def test_chunks_that_overlap_give_the_answers_of_one_run(fp32_bundle: Path, tmp_path: Path) -> None:
    lines = _prompts(30)
    lines[17]["prompt"] = "ab" * 90  # more room than the lines before need
    lines[20]["prompt"] = ""
    worker = _worker(fp32_bundle)
    chunks = [[Line(at + i + 1, at + i, lines[at + i]) for i in range(5)] for at in range(0, 30, 5)]
    with ThreadPoolExecutor(3) as threads:
        outcomes = [one for chunk in threads.map(worker.answer, chunks) for one in chunk]
    refused = outcomes.pop(20)
    assert isinstance(refused, InputError)
    assert "empty prompt" in refused.message
    expected = _locally(fp32_bundle, [line for line in lines if line["prompt"]], tmp_path)
    assert outcomes == [
        {name: value for name, value in record.items() if name not in ("id", "key")} for record in expected
    ]
    assert worker.figures()["generated_tokens"] == sum(record["generated_tokens"] for record in expected)


def test_a_worker_with_another_model_says_so(fp32_bundle: Path) -> None:
    with pytest.raises(InputError, match="another model"):
        LineWorker(fp32_bundle, "0" * 64, "cpu", 1, None, 1, {})


def test_a_worker_that_fails_answers_nothing_more(fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _worker(fp32_bundle)

    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(worker._work, "run", fail)
    for number in range(1, 4):
        with pytest.raises(RuntimeError, match="out of order"):
            worker.answer([Line(number, number, {"prompt": "x"})])


@pytest.mark.parametrize(
    ("cpus", "workers", "threads", "plan"),
    [
        ([2], None, None, Plan(1, 2, 1)),
        ([2], 2, None, Plan(2, 1, 2)),
        ([1, 1], 2, None, Plan(2, 1, 1)),
        ([0, 8, 4], None, None, Plan(2, 4, 2)),
        ([8, 8], 4, None, Plan(4, 4, 2)),
        ([64], 8, None, Plan(8, 8, 8)),
        ([4], 2, 4, Plan(2, 4, 1)),
        ([0], None, None, Plan(1, 1, 1)),
    ],
)
def test_processors_are_divided(cpus: list[int], workers: int | None, threads: int | None, plan: Plan) -> None:
    assert plan_workers(cpus, workers, threads) == plan


def test_no_worker_is_an_error() -> None:
    with pytest.raises(OptionError, match="--workers 0"):
        plan_workers([2], 0, None)


@pytest.mark.parametrize(
    ("provider", "gpus", "asked"),
    [("cuda", 0, 1), ("tensorrt", 2, 1), ("cuda,cpu", 2, 1), ("cuda,cpu", 0, None), ("cpu", 2, None)],
)
def test_workers_ask_for_a_gpu_where_they_need_one(
    provider: str, gpus: int, asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "connect", lambda _: Asking(gpus))
    with pytest.raises(Asked) as caught:
        Pool(None, 1, 1).open(tmp_path, "", provider, None, 64, {})
    assert caught.value.args[0].get("num_gpus") == asked


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match="`ray`") as refusal:
        Pool(None, 1, 1)
    assert refusal.value.hint == "pip install 'llmfast[ray]'"


def test_lines_are_numbered_through_the_files(tmp_path: Path) -> None:
    _write(tmp_path / "b.jsonl", [{"prompt": "three"}])
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\nnonsense\n')
    (tmp_path / "c.txt").write_text("other")
    first, bad, last = find_source(f"{tmp_path}/*.jsonl").read("prompt", (), "settings")
    assert (first.number, bad.number, last.number) == (1, 3, 4)
    assert last.fields == {"prompt": "three"}
    assert bad.error is not None
    assert f"`{tmp_path}/a.jsonl`: line 3: not JSON" in bad.error.message
    assert len({first.key, bad.key, last.key}) == 3
    (one,) = find_source(str(tmp_path / "c.txt")).read("prompt", (), "")
    assert one.fields == {"prompt": "other"}


@pytest.mark.parametrize("pattern", ["nothing", "*.none", "s3x://bucket/a.jsonl", ""])
def test_what_is_no_input_is_named(pattern: str, tmp_path: Path) -> None:
    if "://" in pattern:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'llmfast[ray]'")
    with pytest.raises((InputError, UnsupportedError), match=re.escape(pattern.partition("*")[0] or str(tmp_path))):
        find_source(pattern if "://" in pattern else f"{tmp_path}/{pattern}")


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match="several kinds"):
        find_source(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PAR1, then nothing", b"PAR1" + bytes(64) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_named(content: bytes, fp32_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'llmfast[ray]'")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"cannot read `{broken}`: ")):
        answer_folder(fp32_bundle, str(broken), str(tmp_path / "out"), TWO)
    assert not (tmp_path / "out").exists()


def _lines(count: int) -> list[Line]:
    return [Line(number, 1000 - number, {"id": f"n{number}"}) for number in range(1, count + 1)]


def test_a_part_that_a_killed_run_was_sorting_is_no_strange_file(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f"..part-00000.jsonl.llmfast-{dead.pid}-0123abcd"
    left.write_text("half")
    os.utime(left, (0, 0))
    lines = _lines(2)
    part = Part(PartFolder(str(tmp_path), "jsonl", False, False), 0, lines)
    for line in reversed(lines):
        part.settle(line, {"answer": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.jsonl"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_part_is_there_when_it_is_complete_and_goes_on(form: str, scheme: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    lines, output = _lines(3), f"{scheme}{tmp_path / 'out'}"
    name = tmp_path / "out" / f"part-00000.{form}"
    part = Part(PartFolder(output, form, False, False), 0, lines)
    part.settle(lines[2], {"answer": "c", "embedding": np.ones(2, np.float32)})
    part.settle(lines[0], {"answer": "a", "embedding": np.ones(2, np.float32)})
    part.close()
    assert not name.exists()
    part = Part(PartFolder(output, form, False, False), 0, lines)
    assert (part.missing, part.before) == ([lines[1]], 2)
    part.settle(lines[1], None)  # no answer; the next run tries it again
    assert name.exists()
    part = Part(PartFolder(output, form, False, False), 0, lines)
    assert part.missing == [lines[1]]
    part.settle(lines[1], {"answer": "b", "embedding": np.ones(2, np.float32)})
    rows = [json.loads(line) for line in name.open()] if form == "jsonl" else parquet.read_table(name).to_pylist()
    assert [(row["id"], row["answer"], row["embedding"]) for row in rows] == [
        ("n1", "a", [1, 1]),
        ("n2", "b", [1, 1]),
        ("n3", "c", [1, 1]),
    ]
    assert Part(PartFolder(output, form, False, False), 0, lines).missing == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name.name]
    with pytest.raises(OutputExistsError, match="other prompts"):
        Part(PartFolder(output, form, False, False), 0, _lines(2))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name.name]
    with pytest.raises(OutputExistsError, match="no longer has"):
        PartFolder(output, form, False, False).check_end(0)
    assert Part(PartFolder(output, form, False, True), 0, lines).missing == lines


def test_other_things_in_the_output_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"thesis\.txt"):
            PartFolder(str(tmp_path), "jsonl", False, overwrite)
    (tmp_path / "thesis.txt").rename(tmp_path / "part-00000.parquet")
    with pytest.raises(OutputExistsError, match="parquet"):
        PartFolder(str(tmp_path), "jsonl", False, False)
    folder = PartFolder(str(tmp_path), "jsonl", False, True)
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]
    Part(folder, 0, _lines(1))  # what it replaces goes now that there is something to replace it
    assert [path.name for path in tmp_path.iterdir()] == [".part-00000.jsonl"]
    with pytest.raises(OutputExistsError, match="is a file"):
        PartFolder(str(_write(tmp_path / "file", [])), "jsonl", False, False)


@pytest.mark.parametrize("options", [{"workers": 0}, {"address": "nowhere"}])
def test_parts_stay_when_there_is_nobody_to_overwrite_them(
    options: dict[str, Any], fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "connect", _no_cluster if "address" in options else _Machine)
    source = _write(tmp_path / "in.jsonl", _prompts(3))
    (tmp_path / "out").mkdir()
    part = _write(tmp_path / "out" / "part-00000.jsonl", [{"id": 1}])
    with pytest.raises((OptionError, UnsupportedError)):
        answer_folder(fp32_bundle, str(source), str(tmp_path / "out"), ClusterOptions(**options), overwrite=True)
    assert part.read_text() == '{"id": 1}\n'


def _no_cluster(address: str) -> None:
    raise UnsupportedError(f"no Ray cluster at `{address}`")


class _Machine:
    """Stands in for Ray: one machine of one processor."""

    def __init__(self, _: object) -> None:
        pass

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1}}]

    def shutdown(self) -> None:
        pass


def _two(cluster: Cluster, **changes: Any) -> ClusterOptions:
    return ClusterOptions(**{**TWO.__dict__, "address": cluster.address, **changes})


def test_rows_of_parquet_go_through_a_cluster(cluster: Cluster, fp32_bundle: Path, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = [{**line, "note": "says nothing"} for line in _prompts(40)]
    lines[3]["max_new_tokens"] = None
    (tmp_path / "in").mkdir()
    for number, (start, end) in enumerate(pairwise((0, 15, 40))):
        parquet.write_table(arrow.Table.from_pylist(lines[start:end]), tmp_path / "in" / f"{number}.parquet")
    asked = [{name: value for name, value in line.items() if value is not None} for line in lines]
    summary = answer_folder(fp32_bundle, str(tmp_path / "in"), str(tmp_path / "out"), _two(cluster), max_tokens=9)
    rows = [row for part in sorted((tmp_path / "out").iterdir()) for row in parquet.read_table(part).to_pylist()]
    assert _without_keys(rows) == _without_keys(_locally(fp32_bundle, asked, tmp_path, max_tokens=9))
    assert (summary.answered, summary.failed, summary.figures["exact"]) == (40, 0, True)
    assert summary.figures["generated_tokens"] == sum(row["generated_tokens"] for row in rows)


class _Mortal:
    """Stands in for a worker; one line kills it, others get an answer that says where."""

    def __init__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        pass

    def answer(self, lines: list[Line]) -> list[dict[str, Any]]:
        if any(line.fields["prompt"] == "die" for line in lines):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return [{"answer": line.fields["prompt"]} for line in lines]

    def figures(self) -> dict[str, Any]:
        return {"texts_per_s": 1.0}


def test_a_line_that_kills_its_workers_is_given_up_alone(
    cluster: Cluster,
    fp32_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "Actor", _Mortal)
    lines = [{"prompt": "die" if number == 37 else str(number)} for number in range(80)]
    source = _write(tmp_path / "in.jsonl", lines)
    summary = answer_folder(fp32_bundle, str(source), str(tmp_path / "out"), _two(cluster), batch_size=1)
    assert [record["answer"] for record in _answers(tmp_path / "out")] == [
        str(number) for number in range(80) if number != 37
    ]
    assert (summary.answered, summary.failed, summary.crashed, summary.figures["deaths"]) == (79, 1, 1, 3)
    assert summary.errors == [{"line": 38, "error": "3 workers died while answering it"}]


def test_what_keeps_workers_from_the_model_ends_the_run(
    cluster: Cluster, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _write(tmp_path / "in.jsonl", _prompts(3))

    def digest(*_: object) -> str:
        return "0" * 64

    monkeypatch.setattr("llmfast.infer.cluster.run.settings_digest", digest)
    with pytest.raises(InputError, match="another model"):
        answer_folder(fp32_bundle, str(source), str(tmp_path / "out"), _two(cluster))


def test_a_run_that_is_killed_goes_on(cluster: Cluster, fp32_bundle: Path, tmp_path: Path) -> None:
    lines = [{**line, "max_new_tokens": 150} for line in _prompts(60)]
    _write(tmp_path / "a.jsonl", lines[:25])
    _write(tmp_path / "b.jsonl", lines[25:])
    command = [sys.executable, "-m", "llmfast", "infer", str(fp32_bundle), "--input", f"{tmp_path}/?.jsonl"]
    command += ["--output", str(tmp_path / "out"), "--engine", "ray", "--address", cluster.address]
    command += ["--workers", "2", "--threads", "1", "--part-lines", "16", "--batch-size", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while sum(path.read_text().count("\n") for path in (tmp_path / "out").glob("*part-*")) < 20:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]), signal.SIGKILL)
    process.communicate()
    again = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert summary["answered_before"] > 0
    assert summary["answered"] + summary["answered_before"] == 60
    records = _answers(tmp_path / "out")
    assert _without_keys(records) == _without_keys(_locally(fp32_bundle, lines, tmp_path))


def test_when_a_node_dies_its_rows_are_answered_once_elsewhere(
    cluster: Cluster,
    fp32_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [{**line, "max_new_tokens": 60} for line in _prompts(120)]
    source = _write(tmp_path / "in.jsonl", lines)
    answers: Callable[..., Any] = Pool.answers

    def killing(pool: Pool, chunks: Any) -> Iterator[Any]:
        while not all(worker.is_ready for worker in pool._workers):
            pool._wait(1)
        is_killed = False
        for done in answers(pool, chunks):
            yield done
            if not is_killed:
                assert all(worker.chunks for worker in pool._workers)
                cluster.kill_second()
                is_killed = True

    monkeypatch.setattr(Pool, "answers", killing)
    summary = answer_folder(fp32_bundle, str(source), str(tmp_path / "out"), _two(cluster))
    records = _answers(tmp_path / "out")
    assert [record["id"] for record in records] == list(range(120))
    assert _without_keys(records) == _without_keys(_locally(fp32_bundle, lines, tmp_path))
    assert (summary.answered, summary.failed, summary.figures["deaths"]) == (120, 0, 1)
    assert re.search(r"a worker died; its [1-9]\d* lines", capsys.readouterr().err)


def test_lines_that_killed_their_workers_are_no_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> Summary:
        summary = Summary("in", "out", "text-generation", lines=3, figures={"texts_per_s": 1.0})
        summary.fail(Line(1, 1, {}, place="`in`: line 1"), InputError("`prompt` is not a text"))
        summary.fail(Line(2, 2, {}, place="`in`: line 2"), NativeCrashError("3 workers died while answering it"))
        return summary

    monkeypatch.setattr("llmfast.infer.cluster.run.answer_folder", crash)
    result = CliRunner().invoke(app, ["infer", "model", "--input", "in", "-o", "out", "--engine", "ray"])
    assert result.exit_code == NativeCrashError.exit_code
    assert "no answer to 2 of the 3 lines of `in`: workers died while answering 1 of them" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "ray", "--prompt", "x"], "--prompt is for --engine local"),
        (["--engine", "ray", "--input", "x.jsonl"], "--output FOLDER"),
        (["--engine", "spark", "--input", "x.jsonl"], "choose from: local, ray"),
        (["--workers", "2", "--prompt", "x"], "--workers is for --engine ray"),
        (["--engine", "ray", "--input", "x.jsonl", "-o", "out", "--parts", "csv"], "--parts"),
    ],
)
def test_options_of_the_other_engine_are_refused(
    arguments: list[str], message: str, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "x.jsonl", _prompts(1))
    result = CliRunner().invoke(app, ["infer", str(fp32_bundle), *arguments])
    assert result.exit_code == OptionError.exit_code
    assert message in result.output + result.stderr
