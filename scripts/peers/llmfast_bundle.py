"""A bundle of llmfast, opened as `llmfast infer` does, without speculation. `compare.py` compares the peers with it.

Of a bundle with two graphs the one that decodes is scored, as `llmfast bench` does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peers.protocol import serve

if TYPE_CHECKING:
    import numpy as np

    from llmfast.infer.lanes import Lanes


class Model:
    def __init__(self, folder: Path, form: str, threads: int, context: int) -> None:
        from llmfast.bundle import ModelBundle
        from llmfast.infer.opening import open_decoder

        self._bundle, self._threads, self._context = ModelBundle.open(folder), threads, context
        self._engine = open_decoder(self._bundle, threads=threads, max_length=context)
        self._lanes: Lanes | None = None

    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        import numpy as np

        self._engine.reset()
        logits = self._engine.prefill(np.array(ids, np.int64))
        for number in range(count):
            token = int(logits.argmax())
            emit(token)
            if number + 1 < count:
                logits = self._engine.decode(token)

    def generate_many(self, batch: list[list[int]], count: int) -> list[int]:
        import numpy as np

        from llmfast.infer.batch import Request
        from llmfast.infer.lanes import Lanes
        from llmfast.infer.opening import open_lanes
        from llmfast.tokenizer import Tokenizer

        if self._lanes is None:
            rows, _ = open_lanes(self._bundle, "cpu", self._threads, self._context, len(batch), None)
            tokenizer = Tokenizer.load(self._bundle.path)
            tokenizer.eos_ids = ()  # answers of one length
            self._lanes = Lanes(rows, tokenizer)
        requests = (Request(number, np.array(ids, np.int64), count) for number, ids in enumerate(batch))
        generations = (event.generation for event in self._lanes.answer(requests))
        return [generation.generated_tokens for generation in generations if generation is not None]

    def score(self, ids: list[int]) -> "np.ndarray":
        import numpy as np

        return self._engine.score(np.array(ids, np.int64))


if __name__ == "__main__":
    serve(("llmfast", "onnxruntime"), None, Model)
