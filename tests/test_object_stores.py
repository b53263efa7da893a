"""Prompts and answers in object stores: fsspec's in memory, and S3 from a server on this machine."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmfast.errors import InputError, OutputExistsError, ResourceError, UnsupportedError
from llmfast.infer.cluster import run as run_module
from llmfast.infer.cluster.parts import Part, PartFolder
from llmfast.infer.cluster.run import ClusterOptions, answer_folder
from llmfast.infer.cluster.source import find_source, resolve
from llmfast.infer.jsonl import Line
from llmfast.infer.many import Summary, answer_file
from tests.ray_cluster import Cluster


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Return the address of an S3 server on this machine, which Arrow's S3 client finds by the environment."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        yield address
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> str:
    """Return the URI of an empty bucket: of fsspec, in this process's memory, or of a server that speaks S3."""
    pytest.importorskip("pyarrow", "22", reason="pyarrow is not installed, or has no way to fsspec yet")
    if request.param == "s3":
        address = request.getfixturevalue("s3")
        httpx.post(f"{address}/moto-api/reset").raise_for_status()
        httpx.put(f"{address}/bucket").raise_for_status()
        return "s3://bucket"
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.store.clear()
    return "fsspec+memory://bucket"


def _put(uri: str, lines: list[dict[str, Any]]) -> None:
    files, path = resolve(uri)
    with files.open_output_stream(path) as out:
        out.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())


def _get(uri: str) -> dict[str, bytes]:
    fs = pytest.importorskip("pyarrow.fs")
    files, path = resolve(uri)
    found = files.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {one.base_name: files.open_input_stream(one.path).read() for one in found}


def _lines(count: int) -> list[Line]:
    return [Line(number, 1000 - number, {"id": f"n{number}"}) for number in range(1, count + 1)]


@pytest.mark.parametrize("pattern", ["", "/", "/*.jsonl", "/?.jsonl", "/a.jsonl"])
def test_lines_of_an_object_store_are_numbered_through_its_files(pattern: str, store: str) -> None:
    text = "x" * (3 << 20)  # longer than what is read at once
    _put(f"{store}/in/b.jsonl", [{"prompt": "three"}])
    _put(f"{store}/in/a.jsonl", [{"prompt": text}, {"prompt": "two"}])
    _put(f"{store}/in/notes.md", [])
    if "?" in pattern:  # which begins the query of a URI
        with pytest.raises((InputError, UnsupportedError)):
            find_source(f"{store}/in{pattern}")
        return
    lines = list(find_source(f"{store}/in{pattern}").read("prompt", (), "settings"))
    expected = [text, "two", "three"][: 2 if "a" in pattern else 3]
    assert [(line.number, line.fields["prompt"]) for line in lines] == list(enumerate(expected, start=1))


@pytest.mark.parametrize("pattern", ["in/*.jsonl", "*/a.jsonl", "in/**/*.jsonl", "in/*/*.jsonl", "**/b.jsonl", "in/**"])
def test_patterns_are_those_of_this_machine(pattern: str, store: str, tmp_path: Path) -> None:
    for name in ("in/a.jsonl", "in/deep/a.jsonl", "in/deep/er/b.jsonl", "other/b.jsonl"):
        _put(f"{store}/{name}", [{"prompt": name}])
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name}))
    here, there = find_source(f"{tmp_path}/{pattern}"), find_source(f"{store}/{pattern}")
    assert [str(Path(file).relative_to(tmp_path)) for file in here.files] == [
        file.partition("bucket/")[2] for file in there.files
    ]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_parts_in_an_object_store_are_there_when_they_are_complete(form: str, store: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    lines, name = _lines(3), f"part-00000.{form}"
    folder = PartFolder(f"{store}/out", form, False, False)
    part = Part(folder, 0, lines)
    part.settle(lines[1], {"answer": "b"})
    part.close()
    folder.close()
    assert _get(f"{store}/out") == {}
    folder = PartFolder(f"{store}/out", form, False, False)
    part = Part(folder, 0, lines)
    assert part.missing == lines  # files of a store can't grow: it is begun again
    for line, answer in zip(reversed(lines), "cba", strict=True):
        part.settle(line, {"answer": answer})
    folder.close()
    folder.check_end(1)
    found = _get(f"{store}/out")
    assert list(found) == [name]
    rows = (
        [json.loads(line) for line in found[name].splitlines()]
        if form == "jsonl"
        else parquet.read_table(io.BytesIO(found[name])).to_pylist()
    )
    assert [(row["id"], row["answer"]) for row in rows] == [("n1", "a"), ("n2", "b"), ("n3", "c")]
    again = PartFolder(f"{store}/out", form, False, False)
    assert Part(again, 0, lines).missing == []
    with pytest.raises(OutputExistsError, match="other prompts"):
        Part(again, 0, _lines(2))
    again.close()
    assert Part(PartFolder(f"{store}/out", form, False, True), 0, lines).missing == lines
    assert _get(f"{store}/out") == {}


def test_answers_in_parts_that_are_not_complete_are_lost_in_an_object_store_only(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, lost in ((f"{store}/out", 1), (str(tmp_path / "out"), 0)):
        folder = PartFolder(output, "jsonl", False, False)
        run = run_module._Run(None, folder, Summary("in", output, "text-generation"), 2)
        chunks = list(run.chunks(iter(_lines(3)), 1))
        for chunk in chunks[::2]:
            run.settle(chunk, [{"answer": "a"}])
        run.give_up()
        folder.close()
        told = capsys.readouterr().err
        assert f"note: {2 - lost} answers are in `{output}`" in told
        assert ("note: 1 answers in parts that were not complete are lost" in told) == bool(lost)
        found = Part(PartFolder(output, "jsonl", False, False), 0, _lines(2))
        assert (found.before, found.written) == (1 - lost, 0)


def test_a_bucket_that_is_not_there_is_told_before_the_work(s3: str) -> None:
    with pytest.raises(ResourceError, match="nowhere"):
        PartFolder("s3://nowhere/out", "jsonl", False, False)
    with pytest.raises(InputError, match="nowhere"):
        find_source("s3://nowhere/in")


def test_a_cluster_answers_what_lies_in_an_object_store(
    cluster: Cluster, fp32_bundle: Path, tmp_path: Path, store: str
) -> None:
    lines = [{"id": number, "prompt": f"{'ab' * (number % 7)} {number}"} for number in range(40)]
    for name, start, end in (("a", 0, 15), ("b", 15, 40)):
        _put(f"{store}/in/{name}.jsonl", lines[start:end])
    two = ClusterOptions(cluster.address, workers=2, threads=1, part_lines=16)
    options = {"cluster": two, "max_tokens": 9}
    summary = answer_folder(fp32_bundle, f"{store}/in/*.jsonl", f"{store}/out", **options)
    assert (summary.answered, summary.failed) == (40, 0)
    parts = _get(f"{store}/out")
    assert sorted(parts) == ["part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl"]
    records = [json.loads(line) for name in sorted(parts) for line in parts[name].splitlines()]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    answer_file(fp32_bundle, tmp_path / "in.jsonl", tmp_path / "out.jsonl", threads=1, max_tokens=9)
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]
    assert [record | {"key": ""} for record in records] == [record | {"key": ""} for record in expected]
    again = answer_folder(fp32_bundle, f"{store}/in/*.jsonl", f"{store}/out", **options)
    assert (again.answered, again.answered_before) == (0, 40)
