"""Tiny models and data for the tests of training."""

import json
from pathlib import Path
from typing import Any

import torch

from llmfast.tune.options import TuneOptions
from llmfast.tune.stage import Tuned, tune
from tests.tiny_encoder import save_encoder

TEXT = "the cat sat on the mat and the dog ran over the hill while it rained. " * 60
MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 16)
        self.inner = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return {"logits": self.head(torch.tanh(self.inner(self.embedding(ids))))}

def factory():
    print("made")
    return Net(), (torch.ones(2, 5, dtype=torch.int64),), {"ids": {0: "batch", 1: "length"}}
"""


def write_text(folder: Path) -> Path:
    """Write a text that a tiny decoder can learn."""
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def write_labelled(path: Path, rows: int = 48, names: tuple[str, ...] = ("cats", "dogs")) -> Path:
    """Write `label text` lines whose label is said by a word."""
    words = [("cat", "the cat sat on a mat"), ("dogs", "two dogs run by the mat")]
    lines = [f"{names[index % len(names)]} {words[index % 2][1]} {'the ' * (index % 5)}" for index in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_encoder(folder: Path, **settings: Any) -> Path:
    """Save a tiny BERT without dropout, as an encoder without a head."""
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0} | settings
    save_encoder(folder, "bert", **settings)
    return folder


def run(source: Path | str | None, output: Path, data: Path, **options: Any) -> Tuned:
    """Train on one thread."""
    settings = {"threads": 1, "precision": "fp32", "device": "cpu", "log_every": 1}
    return tune(None if source is None else str(source), output, TuneOptions(data, **settings | options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Return whether two checkpoints are equal to the last bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses(folder: Path) -> list[float]:
    """Return the training loss of every logged step."""
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
