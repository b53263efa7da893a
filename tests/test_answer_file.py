"""Files of answers: what runs that were cut, killed or repeated leave in them."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfast.errors import OutputExistsError, UnsupportedError
from llmfast.infer import many_prompts
from llmfast.infer.jsonl import AnswerFile, Line
from llmfast.infer.many import answer_file
from tests.tiny_decoder import write_bundle
from tests.tiny_prompts import greedy, infer_file, read_answers, write_lines


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny"))


def test_a_cut_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", *({"prompt": "ab" * (i + 1)} for i in range(8)))
    output = tmp_path / "a.jsonl"
    arguments = ["--max-tokens", 9]
    assert infer_file(tiny, source, output, *arguments).exit_code == 0
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    # Killed: out of order, and in the middle of a line.
    output.write_bytes(lines[4] + lines[1] + lines[6] + lines[2][:30])
    result = infer_file(tiny, source, output, *arguments, "--format", "json")
    assert result.exit_code == 0
    assert output.read_bytes() == whole
    document = json.loads(result.stdout)
    assert (document["answered"], document["answered_before"]) == (5, 3)
    assert "the last line of" in result.stderr
    assert "3 of 8 answers are there already" in result.stderr
    result = infer_file(tiny, source, output, *arguments, "--format", "json")
    assert json.loads(result.stdout)["answered"] == 0
    assert output.read_bytes() == whole
    write_lines(source, *({"prompt": "ab" * (i + 1)} for i in range(9)))
    assert infer_file(tiny, source, output, *arguments).exit_code == 0
    assert output.read_bytes()[: len(whole)] == whole
    assert len(read_answers(output)) == 9


def test_answers_of_other_runs_are_not_mixed_in(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "ab"}, {"prompt": "b"})
    output = tmp_path / "a.jsonl"
    assert infer_file(tiny, source, output, "--max-tokens", 3).exit_code == 0
    before = output.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    write_bundle(other)
    (other / "llmfast.json").write_text((other / "llmfast.json").read_text() + "\n")
    for model, arguments in ((tiny, ["--max-tokens", 4]), (tiny, ["--max-tokens", 3, "--seed", 1]), (other, [])):
        result = infer_file(model, source, output, *arguments)
        assert result.exit_code == 8
        assert "another model, other options or other prompts" in result.stderr
    write_lines(source, {"prompt": "b"}, {"prompt": "ab"})
    assert infer_file(tiny, source, output, "--max-tokens", 3).exit_code == 8
    assert output.read_bytes() == before
    assert infer_file(tiny, source, output, "--max-tokens", 3, "--overwrite").exit_code == 0
    assert read_answers(output)[0]["answer"] == json.loads(before.splitlines()[1])["answer"]


def test_old_answers_stay_until_there_is_a_new_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "ab"}, {"prompt": "b"})
    output = tmp_path / "a.jsonl"
    output.write_text("old\n")

    def fail(*_: object) -> None:
        raise UnsupportedError("no engine runs it")

    with monkeypatch.context() as patch:
        patch.setattr(many_prompts, "open_lanes", fail)
        with pytest.raises(UnsupportedError):
            answer_file(tiny, source, output, overwrite=True, threads=1)
    assert output.read_text() == "old\n"
    assert "the same command" not in capsys.readouterr().err
    answer_file(tiny, source, output, overwrite=True, threads=1, max_tokens=3)
    assert [one["id"] for one in read_answers(output)] == [1, 2]
    write_lines(source, {"prompt": ""})
    assert answer_file(tiny, source, output, overwrite=True, threads=1).failed == 1
    assert not output.exists()  # the run has ended, and none of its lines has an answer


@pytest.mark.parametrize("content", ["no answers", "no answers\n", '{"id": 1}\n', '{"a": 1, "b"', "[]\n"])
def test_files_of_other_things_are_left_alone(content: str, tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "ab"})
    output = tmp_path / "a.jsonl"
    output.write_text(content)
    result = infer_file(tiny, source, output)
    assert result.exit_code == 8
    assert "is no file of answers" in result.stderr
    assert output.read_text() == content


def test_two_runs_do_not_write_one_file(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "ab"})
    with (tmp_path / "a.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = infer_file(tiny, source, tmp_path / "a.jsonl")
    assert result.exit_code == 8
    assert "another process" in result.stderr


def _start(model: Path, source: Path, output: Path, *arguments: object, limit: int | None = None) -> subprocess.Popen:
    command = [sys.executable, "-m", "llmfast", "infer", model, "--input", source, "-o", output, "--threads", 1]
    return subprocess.Popen(
        [str(argument) for argument in [*command, *arguments]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)) if limit else None,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_is_done(number: int, code: int, tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", *({"prompt": f"{i} ab", "max_new_tokens": 90} for i in range(4000)))
    output = tmp_path / "a.jsonl"
    process = _start(tiny, source, output)
    while process.poll() is None and not (output.exists() and output.stat().st_size > 2000):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    answers = read_answers(output)
    assert 0 < len(answers) < 4000
    assert f"{len(answers)} of 4000 answers are in" in errors
    for one in answers[:3]:
        assert one["answer"] == greedy(tiny, f"{one['id'] - 1} ab", 90).text


@pytest.mark.parametrize("number", [1, 3])
def test_a_signal_right_behind_a_write_loses_and_miscounts_nothing(
    number: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "p.jsonl", *({"prompt": f"{i} ab"} for i in range(8)))
    output = tmp_path / "a.jsonl"
    opened = Path.open

    class Interrupted:
        """A file whose write number `number` is the last thing that is done."""

        def __init__(self, file: Any) -> None:
            self._file, self._writes = file, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, content: Any) -> int:
            written: int = self._file.write(content)
            self._writes += 1
            if self._writes == number:
                raise KeyboardInterrupt
            return written

    def open_path(path: Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        file = opened(path, mode, *arguments, **settings)
        return Interrupted(file) if (path, mode) == (output, "ab") else file

    monkeypatch.setattr(Path, "open", open_path)
    with pytest.raises(KeyboardInterrupt):
        answer_file(tiny, source, output, threads=1, max_tokens=5)
    assert len(read_answers(output)) == number
    assert f"{number} of 8 answers are in" in capsys.readouterr().err


def test_a_full_disk_loses_nothing_of_what_was_done(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", *({"prompt": f"{i} ab"} for i in range(30)))
    output = tmp_path / "a.jsonl"
    process = _start(tiny, source, output, "--max-tokens", 5, limit=1500)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "the answers before are kept" in errors
    assert "run the same command again" in errors
    answers = read_answers(output)  # whole lines only
    assert 5 < len(answers) < 15
    result = infer_file(tiny, source, output, "--max-tokens", 5, "--format", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["answered_before"] == len(answers)
    assert [one["id"] for one in read_answers(output)] == list(range(1, 31))


def test_a_full_disk_leaves_a_sorted_file_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [Line(number, 1000 - number, {}) for number in range(1, 6)]
    file = AnswerFile(tmp_path / "a.jsonl", np.array([line.key for line in lines], np.uint64))
    for line in reversed(lines):
        file.write(line, {"answer": "x" * line.number})
    file.close()
    assert [one["id"] for one in read_answers(file.path)] == [5, 4, 3, 2, 1]
    file.put_in_order()
    assert [one["id"] for one in read_answers(file.path)] == [1, 2, 3, 4, 5]
    assert os.listdir(tmp_path) == ["a.jsonl"]
    with pytest.raises(OutputExistsError):
        AnswerFile(file.path, np.array([5], np.uint64))


def test_the_input_is_never_the_output(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "ab"})
    (tmp_path / "link.jsonl").symlink_to(source)
    for output in (source, tmp_path / "link.jsonl"):
        result = infer_file(tiny, source, output, "--overwrite")
        assert result.exit_code == 2
        assert "is the input" in result.stderr
    assert read_answers(source) == [{"prompt": "ab"}]


def test_a_linked_output_stays_a_link(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", *({"prompt": "ab", "max_new_tokens": 9 - i} for i in range(4)))
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert infer_file(tiny, source, tmp_path / "a.jsonl").exit_code == 0
    assert (tmp_path / "a.jsonl").is_symlink()
    assert [one["id"] for one in read_answers(tmp_path / "real.jsonl")] == [1, 2, 3, 4]
