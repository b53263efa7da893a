"""A bundle of llmfast, opened as `llmfast infer` does, without speculation. `compare.py` compares the peers with it.

Of a bundle with two graphs the one that decodes is scored, as `llmfast bench` does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peers.protocol import serve

if TYPE_CHECKING:
    import numpy as np


class Model:
    def __init__(self, folder: Path, form: str, threads: int, context: int) -> None:
        from llmfast.bundle import ModelBundle
        from llmfast.infer.opening import open_decoder

        self._engine = open_decoder(ModelBundle.open(folder), threads=threads, max_length=context)

    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        import numpy as np

        self._engine.reset()
        logits = self._engine.prefill(np.array(ids, np.int64))
        for number in range(count):
            token = int(logits.argmax())
            emit(token)
            if number + 1 < count:
                logits = self._engine.decode(token)

    def score(self, ids: list[int]) -> "np.ndarray":
        import numpy as np

        return self._engine.score(np.array(ids, np.int64))


if __name__ == "__main__":
    serve(("llmfast", "onnxruntime"), None, Model)
