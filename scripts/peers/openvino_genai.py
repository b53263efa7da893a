"""OpenVINO GenAI: weights compressed by optimum-intel. A peer of `compare.py`."""

import sys
from collections.abc import Callable
from pathlib import Path

from peers.protocol import Source, run, serve

REQUIREMENTS = ("openvino-genai>=2026.0", "nncf>=3.0", "optimum-intel>=1.27", "torch>=2.10,<2.14")
# Paged attention is the default; which of the two is faster depends on lengths and machine.
FORMATS = ("int8", "int8 SDPA", "int4", "int4 SDPA")


def convert(source: Source, folder: Path, form: str) -> None:
    bits = form.partition(" ")[0]
    # Groups of 64 fit every width; the default of 128 leaves narrow models, such as 576, out.
    groups = ("--group-size", "64", "--ratio", "1.0") if bits == "int4" else ()
    exporter = (Path(sys.executable).with_name("optimum-cli"), "export", "openvino")
    task = ("--task", "text-generation-with-past")
    run(*exporter, "--model", source.checkpoint, *task, "--weight-format", bits, *groups, folder)


class Model:
    def __init__(self, folder: Path, form: str, threads: int, context: int) -> None:
        import openvino_genai

        self._api = openvino_genai
        attention = "SDPA" if form.endswith(" SDPA") else "PA"
        settings = {"ATTENTION_BACKEND": attention, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **settings)

    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        import numpy as np
        import openvino

        prompt = np.array([ids], np.int64)
        inputs = self._api.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
        config = self._api.GenerationConfig(
            max_new_tokens=count, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        self._pipeline.generate(inputs, config, self._streamer(emit))

    def _streamer(self, emit: Callable[[int], object]) -> object:
        api = self._api

        class Streamer(api.StreamerBase):
            def write(self, token: int | list[int]) -> object:
                for one in token if isinstance(token, list) else [token]:
                    emit(one)
                return api.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        return Streamer()


if __name__ == "__main__":
    serve(("openvino-genai", "openvino", "nncf", "optimum-intel"), convert, Model)
