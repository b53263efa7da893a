"""Data files: JSON lines, CSV, TSV and plain lines give the same records, streamed; bad lines are named."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import processors

from llmfast.errors import InputError
from llmfast.records import Mapped, Records
from llmfast.text import leading_windows
from llmfast.tokenizer import Tokenizer
from tests.conftest import make_tokenizer

PAIRS = [("1.5", "a dog, big", 'say "hi"'), ("0", "x", "y z")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.txt", '1.5\ta dog, big\tsay "hi"\n\n  \n0\tx\ty z\n'),
        ("pairs.tsv", '1.5\ta dog, big\tsay "hi"\r\n0\tx\ty z'),
        ("named.tsv", 'b\tscore\ta\nsay "hi"\t1.5\ta dog, big\ny z\t0\tx\n'),
        ("pairs.csv", 'Score,sentence1,sentence2\n1.5,"a dog, big","say ""hi"""\n\n0,x,y z\n'),
        (
            "pairs.jsonl",
            '{"score": 1.5, "a": "a dog, big", "b": "say \\"hi\\""}\n{"score": 0, "a": "x", "b": "y z"}\n',
        ),
        ("bom.txt", '\ufeff1.5\ta dog, big\tsay "hi"\n0\tx\ty z\n'),
    ],
)
def test_all_forms_give_the_same_records(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    records = Records(tmp_path / name, "score", "a", "b", numeric=("score",))
    assert list(records) == list(records) == PAIRS
    assert len(records) == 2
    assert [len(batch) for batch in Records(tmp_path / name, "score", "a", "b").batches(1)] == [1, 1]
    assert list(Mapped(records.batches(2), len)) == [2]
    assert Records.fits(tmp_path / name, "score", "a", "b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "1\ta\tb\nhigh\ta\tb\n", "line 2"),
        ("a.txt", "1\ta\tb\n1\tonly one\n", "line 2"),
        ("a.txt", "1\ta\tb\tc\n", "line 1"),
        ("a.txt", "1\ta\t \n", "line 1"),
        ("a.txt", "nan\ta\tb\n", "line 1"),
        ("a.txt", "\n \n", "no usable line"),
        ("a.jsonl", '{"score": 1, "a": "x", "b": "y"}\n{"score": 1}\n', "line 2"),
        ("a.jsonl", "{}\n", "line 1 has no `score`"),
        ("a.jsonl", '{"score": null, "a": "x", "b": "y"}\n', "line 1 has no `score`"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.jsonl", '{"score"\n', "not JSON: .*line 1"),
        ("a.csv", "score,a\n1,x\n", "no column `"),
        ("a.csv", "score,a,b\n1,x\n", "line 2"),
        ("a.csv", "score,a,b\n", "no usable line"),
        ("a.csv", "score,a,b\n1,x,y,z\n", "line 2 has 4 columns, not 3"),
        ("a.csv", 'score,a,b\n1,"x\ny",z\n\n2,"v\nw",\n', "line 5"),
        ("a.tsv", "score\ta\tb\n1\tx\ty\tz\n", "line 2 has 4 columns, not 3"),
        ("a.csv", "", "no column `"),
        ("a.txt", b"\xff\xfe1\ta\tb", "not UTF-8"),
        ("a.txt", None, "cannot read"),
    ],
)
def test_bad_files_and_lines_are_named(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        Records(tmp_path / name, "score", "a", "b", numeric=("score",))


def test_columns_may_be_optional_and_several(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("q\tc\nq\tc\tone\nq\tc\tone\ttwo\n")
    expected = [("q", "c", ""), ("q", "c", "one"), ("q", "c", "one\ttwo")]
    assert list(Records(tmp_path / "q.txt", "question", "context", "answer", optional=1)) == expected
    (tmp_path / "q.jsonl").write_text('{"question": "q", "context": "c", "answers": ["one", "two"]}\n')
    assert list(Records(tmp_path / "q.jsonl", "question", "context", "answer", optional=1)) == [("q", "c", "one\ttwo")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,Review,stars\n7,"x\ny",1\n8,,2\n9,z,3\n'),
        ("a.ndjson", '{"stars": 1, "Review": "x\\ny"}\n\n\n{"stars": 2, "Review": ""}\n{"stars": 3, "Review": "z"}\n'),
        ("a.tsv", "stars\tReview\n1\tx\n\n2\t\n3\tz\n"),
    ],
)
def test_columns_may_have_other_names_and_holes(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    fields = {"label": "stars", "text": "Review"}
    with pytest.raises(InputError, match=r"malformed line: .*line 4"):
        Records(tmp_path / name, "label", "text", fields=fields)
    records = Records(tmp_path / name, "label", "text", fields=fields, skip_empty=True)
    lines = {"a.csv": [2, 5], "a.ndjson": [1, 5], "a.tsv": [2, 5]}[name]
    assert [(line, values[0]) for line, values in records.numbered()] == list(zip(lines, "13", strict=True))
    with pytest.raises(InputError, match=r"no (column )?`mark`") as lacking:
        Records(tmp_path / name, "label", "text", fields={"label": "mark", "text": "Review"})
    assert ("stars" in lacking.value.hint, "--field label=NAME" in lacking.value.hint) == (True, True)


def test_a_large_file_costs_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    with file.open("w") as out:
        for _ in range(300):
            out.write("word " * 200_000 + "\n")  # 300 MB
    program = (
        "import sys; from pathlib import Path; from llmfast.bench.machine import peak_rss_bytes; "
        "from llmfast.records import Records\n"
        "print(len(Records(Path(sys.argv[1]), 'text')), peak_rss_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == 300
    assert peak < 100_000_000


def test_windows_are_cut_from_the_beginning_of_a_text(tmp_path: Path) -> None:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    text = "".join(f"line {number} ab é\n" for number in range(3000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    whole = tokenizer.encode(text)
    windows = leading_windows(tmp_path / "text.txt", tokenizer, 4, 32, 1)
    assert [ids.tolist() for ids, _ in windows] == [whole[start : start + 32] for start in range(0, 128, 32)]
    for ids, scored in windows:
        assert tokenizer.decode(ids[1:]) == scored
    (tmp_path / "text.jsonl").write_text('{"text": "ab ab"}\n{"text": "cd"}\n')
    ((ids, _),) = leading_windows(tmp_path / "text.jsonl", tokenizer, 1, 5, 1)
    assert ids.tolist() == tokenizer.encode("ab ab\ncd")[:5]
    with pytest.raises(InputError, match="text too short"):
        leading_windows(tmp_path / "text.jsonl", tokenizer, 1, 50, 1)


def test_the_bos_of_a_window_stands_for_no_text(tmp_path: Path) -> None:
    backend = make_tokenizer()
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    text = "".join(f"line {number} ab\n" for number in range(300))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    whole = tokenizer.encode(text, add_special_tokens=False)
    for skipped in (1, 4):
        windows = leading_windows(tmp_path / "text.txt", tokenizer, 3, 32, skipped)
        assert [ids.tolist() for ids, _ in windows] == [[bos, *whole[start : start + 31]] for start in (0, 31, 62)]
        assert [scored for _, scored in windows] == [tokenizer.decode(ids[skipped:]) for ids, _ in windows]
        if skipped == 1:
            assert text.startswith("".join(scored for _, scored in windows))
