"""llama.cpp through llama-cpp-python's C interface, from a GGUF file. A peer of `compare.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peers.protocol import Source, serve

if TYPE_CHECKING:
    import numpy as np

# From source, for this machine's instructions: what is built for any machine is slower. It takes about ten minutes.
REQUIREMENTS = ("--no-cache-dir", "--no-binary=llama-cpp-python", "llama-cpp-python>=0.3.30")
BUILD_SETTINGS = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}
FORMATS = ("Q8_0", "Q4_0")


def convert(source: Source, folder: Path, form: str) -> None:
    import llama_cpp

    if source.gguf is None:
        raise SystemExit("llama.cpp needs the checkpoint as a GGUF file: --gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    params.allow_requantize = True
    target = folder / f"{form}.gguf"
    if llama_cpp.llama_model_quantize(str(source.gguf).encode(), str(target).encode(), params):
        raise SystemExit(f"llama.cpp can't quantize `{source.gguf}` to {form}")


class Model:
    def __init__(self, folder: Path, form: str, threads: int, context: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        (path,) = folder.glob("*.gguf")
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = context, context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        import numpy as np

        self._forget()
        for _ in range(count):
            tokens = (self._api.llama_token * len(ids))(*ids)
            if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids))):
                raise RuntimeError("llama_decode failed")
            logits = np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self._vocab_size,))
            ids = [int(logits.argmax())]
            emit(ids[0])

    def score(self, ids: list[int]) -> "np.ndarray":
        import numpy as np

        self._forget()
        batch = self._api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = True
        status = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if status:
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (len(ids), self._vocab_size))

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)


if __name__ == "__main__":
    serve(("llama-cpp-python",), convert, Model)
