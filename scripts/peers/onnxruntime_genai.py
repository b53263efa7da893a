"""onnxruntime-genai: its own builder's graphs and its own loop. A peer of `compare.py`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peers.protocol import Source, run, serve

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime_genai

REQUIREMENTS = ("onnxruntime-genai>=0.18", "onnx>=1.20", "onnx-ir", "torch>=2.10,<2.14", "transformers>=5")
FORMATS = ("int4",)


def convert(source: Source, folder: Path, form: str) -> None:
    builder = (sys.executable, "-m", "onnxruntime_genai.models.builder")
    run(*builder, "-m", source.checkpoint, "-o", folder, "-p", form, "-e", "cpu", "-c", folder / "cache")


class Model:
    def __init__(self, folder: Path, form: str, threads: int, context: int) -> None:
        import onnxruntime_genai

        self._api = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        generator = self._read(ids, len(ids) + count)
        for _ in range(count):
            generator.generate_next_token()
            emit(int(generator.get_next_tokens()[0]))

    def score(self, ids: list[int]) -> "np.ndarray":
        return self._read(ids, len(ids) + 1).get_output("logits")[0]

    def _read(self, ids: list[int], length: int) -> "onnxruntime_genai.Generator":
        params = self._api.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = self._api.Generator(self._model, params)
        generator.append_tokens(ids)
        return generator


if __name__ == "__main__":
    serve(("onnxruntime-genai", "onnxruntime"), convert, Model)
