"""`export --module --weights`: which weights a module of the user's own gets, and those that do not fit."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmfast.errors import InputError, UnsafeInputError
from tests.tiny_module import load


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture
def linear_code() -> str:
    return "def factory():\n    return nn.Sequential(nn.Linear(4, 3)), (torch.ones(2, 4),)"


def test_weights_replace_those_of_the_factory(tmp_path: Path, linear_code: str) -> None:
    weights = {"0.weight": torch.randn(3, 4), "0.bias": torch.randn(3, dtype=torch.float16)}
    save_file(weights, tmp_path / "w.safetensors")
    user = load(tmp_path, linear_code, tmp_path / "w.safetensors")
    torch.testing.assert_close(user.module[0].weight, weights["0.weight"], rtol=0, atol=0)
    torch.testing.assert_close(user.module[0].bias, weights["0.bias"].float(), rtol=0, atol=0)


def test_weights_that_are_shared_are_stored_once(tmp_path: Path) -> None:
    code = """
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
                self.head.weight = self.table.weight

            def forward(self, ids):
                return self.head(self.table(ids))

        def factory():
            return Tied(), (torch.arange(3),)
    """
    save_file({"head.weight": torch.full((5, 4), 2.0)}, tmp_path / "w.safetensors")
    assert load(tmp_path, code, tmp_path / "w.safetensors").module.table.weight.mean() == 2


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"0.weight": torch.ones(3, 4)}, r"1 missing \(0.bias\)"),
        ({"0.weight": torch.ones(3, 5), "0.bias": torch.ones(3)}, r"`0.weight` has shape \[3, 5\].* wants \[3, 4\]"),
        ({"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3), "1.bias": torch.ones(3)}, r"1 unexpected \(1.bias\)"),
        ({"0.weight": torch.full((3, 4), torch.nan), "0.bias": torch.ones(3)}, r"`0.weight` of .*w.safetensors` has N"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, linear_code: str, weights: dict, words: str) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=words):
        load(tmp_path, linear_code, tmp_path / "w.safetensors")


def test_weights_of_a_wrapper_damaged_ones_and_pickles(tmp_path: Path, linear_code: str) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"module.0.weight": torch.ones(3, 4), "module.0.bias": torch.ones(3)}, file)
    with pytest.raises(InputError) as caught:
        load(tmp_path, linear_code, file)
    assert "begin with `module.`" in caught.value.hint
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="truncated or corrupt safetensors"):
        load(tmp_path, linear_code, file)
    with pytest.raises(InputError, match="not found"):
        load(tmp_path, linear_code, tmp_path / "none.safetensors")
    for name in ("w.pt", "w.safetensors"):
        torch.save({"0.weight": torch.ones(3, 4)}, tmp_path / name)
        with pytest.raises(UnsafeInputError, match="is a pickle"):
            load(tmp_path, linear_code, tmp_path / name)
