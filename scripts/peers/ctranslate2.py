"""CTranslate2, int8. A peer of `compare.py`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers.protocol import Source, run, serve

if TYPE_CHECKING:
    import numpy as np

REQUIREMENTS = ("ctranslate2>=4.8", "torch>=2.10,<2.14", "transformers>=5")
FORMATS = ("int8",)
_ROWS = 32  # at once


def convert(source: Source, folder: Path, form: str) -> None:
    converter = Path(sys.executable).with_name("ct2-transformers-converter")
    run(converter, "--model", source.checkpoint, "--output_dir", folder, "--force", "--quantization", form)


class Model:
    def __init__(self, folder: Path, form: str, threads: int, context: int) -> None:
        import ctranslate2

        self._model = ctranslate2.Generator(str(folder), "cpu", compute_type="int8", intra_threads=threads)
        self._tokens = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        self._answer([ids], count, callback=lambda step: emit(step.token_id) and False)

    def generate_many(self, batch: list[list[int]], count: int) -> list[int]:
        return [len(result.sequences_ids[0]) for result in self._answer(batch, count, max_batch_size=_ROWS)]

    def score(self, ids: list[int]) -> "np.ndarray":
        import numpy as np

        return np.array(self._model.forward_batch([ids]))[0]

    def _answer(self, batch: list[list[int]], count: int, **settings: Any) -> list[Any]:
        results: list[Any] = self._model.generate_batch(
            [[self._tokens[index] for index in ids] for ids in batch],
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
            **settings,
        )
        return results


if __name__ == "__main__":
    serve(("ctranslate2",), convert, Model)
