"""PyTorch through transformers, eager, fp32, its growing cache. A peer of `compare.py`, and its reference."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peers.protocol import Source, serve

if TYPE_CHECKING:
    import numpy as np

REQUIREMENTS = ("torch>=2.10,<2.14", "transformers>=5.10")
FORMATS = ("fp32",)


def convert(source: Source, folder: Path, form: str) -> None:
    for path in source.checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())


class Model:
    def __init__(self, folder: Path, form: str, threads: int, context: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        import torch

        cache = None
        with torch.inference_mode():
            for _ in range(count):
                inputs = torch.tensor([ids])
                step = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = step.past_key_values
                ids = [int(step.logits[0, -1].argmax())]
                emit(ids[0])

    def score(self, ids: list[int]) -> "np.ndarray":
        import torch

        with torch.inference_mode():
            return self._model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


if __name__ == "__main__":
    serve(("torch", "transformers"), convert, Model)
