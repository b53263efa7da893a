import io

import numpy as np
import pytest

from llmfast.errors import InputError
from llmfast.text import read_lines, read_stdin, read_text, token_windows


def test_windows_follow_one_another():
    windows = token_windows(np.arange(10), num_samples=2, seq_len=4)
    assert windows.dtype == np.int64
    assert windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_fewer_windows_than_asked_are_noted(capsys):
    assert token_windows(list(range(10)), num_samples=5, seq_len=4).shape == (2, 4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "holds 2 windows of 4 tokens, 5 were asked for" in captured.err


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="3 tokens, one window needs 4"):
        token_windows(np.arange(3), num_samples=1, seq_len=4)


def test_text_is_read_without_its_byte_order_mark(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffh\u00e9 \u65e5\n".encode())
    assert read_text(tmp_path / "text") == "h\u00e9 \u65e5\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text"),
        (b" \n\t\n", "no text"),
        (b"caf\xe9", "not UTF-8 text.*byte 3"),
        (None, "cannot read"),
    ],
)
def test_unusable_text_is_refused(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(path)


def test_standard_input_is_utf8_whatever_the_locale(monkeypatch):
    def give(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))

    give("\ufeffh\u00e9\r\n\u65e5".encode())
    assert read_stdin() == "h\u00e9\n\u65e5"
    assert read_stdin() == ""
    give(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8 text: standard input: byte 3"):
        read_stdin()


def test_lines_are_stripped_and_blank_ones_skipped(tmp_path):
    (tmp_path / "text").write_bytes(b" one \r\n\n  \ntwo")
    assert read_lines(tmp_path / "text") == ["one", "two"]
