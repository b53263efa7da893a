"""Row B5: somebody swaps a data file for a link, between the check and the reading."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmfast.errors import InputError, UnsafeInputError
from llmfast.files import locate, open_located
from llmfast.graph.model import OnnxModel
from tests.faults import graphs

_TRIES = 10_000
_SECRET = b"\xff" * 4 * graphs.SIZE**2


@contextmanager
def _swapping(path: Path, target: Path) -> Iterator[None]:
    """Let a thread put a link to `target` in the place of `path`, and the file back, again and again."""
    content, ended = path.read_bytes(), threading.Event()
    spare, link = path.with_name("spare"), path.with_name("link")

    def swap() -> None:
        while not ended.is_set():
            os.symlink(target, link)
            os.replace(link, path)
            spare.write_bytes(content)
            os.replace(spare, path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_file_swapped_for_a_link_is_never_read(tmp_path: Path) -> None:
    """The link's target is readable, and never read; each try ends in the file's content or a refusal."""
    secret = tmp_path / "secret"
    secret.write_bytes(_SECRET)
    model = OnnxModel.load(graphs.save_external(tmp_path / "model"))
    (tensor,) = model.proto.graph.initializer
    sound = model.read(tensor).tobytes()
    ends = {"read": 0, "refused": 0}
    with _swapping(tmp_path / "model" / "weights.data", secret):
        for _ in range(_TRIES):
            try:
                found = model.read(tensor).tobytes()
            except (InputError, UnsafeInputError):
                ends["refused"] += 1
            else:
                assert found == sound
                ends["read"] += 1
    assert ends["read"]
    assert ends["refused"]


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_a_link_that_appears_after_the_check_is_refused(
    swapped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment that the race above may miss: the check is over, and the way to the file changes."""
    for folder in ("model/inner", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "weights.data").write_bytes(folder.encode())
    place = tmp_path / "model" / "inner" / ("weights.data" if swapped == "file" else "")

    def check_and_swap(folder: Path, location: str, what: str) -> Path:
        found = locate(folder, location, what)
        os.rename(place, tmp_path / "moved")
        place.symlink_to(tmp_path / "outside" / ("weights.data" if swapped == "file" else ""))
        return found

    monkeypatch.setattr("llmfast.files.locate", check_and_swap)
    with pytest.raises(UnsafeInputError, match="changed while it was opened"):
        open_located(tmp_path / "model", "inner/weights.data", "tensor `a`")
    assert place.is_symlink()
