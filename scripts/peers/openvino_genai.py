"""OpenVINO GenAI: weights compressed by optimum-intel. A peer of `compare.py`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peers.protocol import Source, run, serve

if TYPE_CHECKING:
    import numpy as np
    import openvino

REQUIREMENTS = ("openvino-genai>=2026.0", "nncf>=3.0", "optimum-intel>=1.27", "torch>=2.10,<2.14")
# optimum-intel brings it for images, and the index's build fails to load beside a torch of another build.
UNWANTED = ("torchvision",)
# Paged attention is the default; which of the two is faster depends on lengths and machine.
FORMATS = ("int8", "int8 SDPA", "int4", "int4 SDPA")
_BLOCK = 32  # positions in a block of the paged cache on CPUs


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
        self._folder = folder
        self._is_paged = not form.endswith(" SDPA")
        self._settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        backend = "PA" if self._is_paged else "SDPA"
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=backend, **self._settings)
        self._batches: openvino_genai.ContinuousBatchingPipeline | None = None
        self._scorer: openvino.CompiledModel | None = None

    def generate(self, ids: list[int], count: int, emit: Callable[[int], object]) -> None:
        import numpy as np
        import openvino

        self._scorer = None  # it takes memory
        prompt = np.array([ids], np.int64)
        inputs = self._api.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
        config = self._api.GenerationConfig(
            max_new_tokens=count, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        self._pipeline.generate(inputs, config, self._streamer(emit))

    def generate_many(self, batch: list[list[int]], count: int) -> list[int]:
        import numpy as np
        import openvino

        if self._batches is None:
            scheduler = self._api.SchedulerConfig()
            scheduler.max_num_seqs = len(batch)
            self._batches = self._api.ContinuousBatchingPipeline(str(self._folder), scheduler, "CPU", self._settings)
        config = self._api.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        inputs = [openvino.Tensor(np.array([ids], np.int64)) for ids in batch]
        return [len(result.m_generation_ids[0]) for result in self._batches.generate(inputs, [config] * len(inputs))]

    def score(self, ids: list[int]) -> "np.ndarray":
        """The pipeline gives no logits: its graph is run by OpenVINO's own interface, compiled as the pipeline does."""
        import numpy as np
        import openvino

        if self._scorer is None:
            core = openvino.Core()
            graph = core.read_model(self._folder / "openvino_model.xml")
            if self._is_paged:
                from openvino._offline_transformations import paged_attention_transformation

                paged_attention_transformation(graph)
            self._scorer = core.compile_model(graph, "CPU", self._settings)
        request = self._scorer.create_infer_request()
        count = len(ids)
        tokens, positions = np.array(ids, np.int64), np.arange(count)
        if not self._is_paged:
            ones = np.ones((1, count), np.int64)
            inputs = {"input_ids": tokens[None], "attention_mask": ones, "position_ids": positions[None]}
            return request.infer({**inputs, "beam_idx": np.zeros(1, np.int32)})["logits"][0]
        blocks = -(-count // _BLOCK)
        numbers = {
            "max_context_len": count,
            "past_lens": [0],
            "subsequence_begins": [0, count],
            "block_indices": range(blocks),
            "block_indices_begins": [0, blocks],
        }
        inputs = {name: openvino.Tensor(np.array(value, np.int32)) for name, value in numbers.items()}
        inputs |= {"input_ids": openvino.Tensor(tokens), "position_ids": openvino.Tensor(positions)}
        for port in self._scorer.inputs:
            if "_cache." in port.any_name:
                shape = [blocks if size.is_dynamic else size.get_length() for size in port.partial_shape]
                inputs[port.any_name] = openvino.Tensor(port.element_type, openvino.Shape(shape))
        return request.infer(inputs)["logits"].reshape(count, -1)

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
