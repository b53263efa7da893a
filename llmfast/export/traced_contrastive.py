"""The traced route for CLIP, which gives texts and images vectors of one space.

A checkpoint makes a bundle for one of three tasks: the vectors of texts, those of images, or how well each
text describes each image. Source: https://arxiv.org/abs/2103.00020
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast import registry
from llmfast.bundle import MODEL
from llmfast.errors import UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.encoder import load_encoder
from llmfast.export.requirements import require_export_extra
from llmfast.export.traced import TracedExport, describe_text, quiet, run_exporter
from llmfast.export.traced_graph import write_graph
from llmfast.export.traced_parity import prove
from llmfast.export.traced_signals import describe_example, describe_signal, image_shape

if TYPE_CHECKING:
    import torch

# Each was exported and proven; the tests do it again for every entry and task.
_MODEL_TYPES = ("clip",)
_TEXT, _IMAGES = ("input_ids", "attention_mask"), ("pixel_values",)
_INPUTS = {
    "feature-extraction": _TEXT,
    "image-feature-extraction": _IMAGES,
    "zero-shot-image-classification": (*_TEXT, *_IMAGES),
}
_TRACED_LENGTH = 8
_PROVEN = ((1, 3, 1), (2, 7, 3), (5, 64, 2))  # texts, their length, images; the longest text comes on top
_EXAMPLE_TEXTS = (4, 16)  # texts and their length


def supported_contrastive_model_types() -> list[str]:
    """List the models of texts and images that are proven to export."""
    return list(_MODEL_TYPES)


def contrastive_tasks() -> list[str]:
    """List the tasks that such a model can be exported for."""
    return list(_INPUTS)


def write_traced_contrastive(source: Path, task: str, staged: Path, threads: int | None = None) -> TracedExport:
    """Trace a model of texts and images, or one of its halves, write model.onnx, and compare it with PyTorch.

    Args:
        source: a Hugging Face folder with safetensors weights, tokenizer and preprocessor_config.json.
        task: see `contrastive_tasks`.
        staged: the directory to write to.
        threads: threads of ONNX Runtime for the comparison.

    Raises:
        InputError: weights are truncated, missing or not finite, or the processor makes images of another size
            than the model takes.
        UnsupportedError: another task, a processor that is not understood, or no [export] extra.
        GateError: ONNX Runtime and PyTorch disagree.
    """
    require_export_extra()
    import torch

    inputs = _INPUTS.get(task, ())
    checkpoint = SafetensorsCheckpoint(source, has_tokenizer=set(_TEXT) <= set(inputs))
    config = checkpoint.config
    if not inputs:
        raise UnsupportedError(
            f"`{source}`: a `{config.model_type}` can't be exported for {task}",
            f"tasks: {', '.join(contrastive_tasks())}",
        )
    outputs = registry.load("tasks", task).OUTPUTS
    limit = int(config.text_config.max_position_embeddings)
    shape = image_shape(source, config.vision_config) if "pixel_values" in inputs else ()
    of_text = {0: torch.export.Dim("texts"), 1: torch.export.Dim("sequence", max=limit)}
    axes = {name: of_text for name in _TEXT} | {"pixel_values": {0: torch.export.Dim("images")}}
    examples = {name: torch.ones(2, min(_TRACED_LENGTH, limit), dtype=torch.int64) for name in _TEXT}
    examples |= {"pixel_values": torch.zeros(3, *shape)}
    with quiet():
        model = load_encoder(source, config, "AutoModel")
        module = _as_module(model, inputs, outputs)
        program = run_exporter(module, {name: examples[name] for name in inputs}, axes, outputs)
        write_graph(program.model, dict(model.named_parameters()), staged)
        feeds = _feeds(config.text_config, limit, shape)
        samples = ({name: one[name] for name in inputs} for one in feeds)
        parity = prove(_Reference(model, outputs), staged / MODEL, samples, threads)
    return TracedExport(
        graphs={"model": {"file": MODEL, "inputs": list(inputs), "outputs": list(outputs)}},
        architecture=_describe(config, inputs, limit, shape),
        parity=parity,
    )


def _describe(config: Any, inputs: tuple[str, ...], limit: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the sizes of the halves that are there, and random inputs for a graph that no text alone can feed."""
    facts: dict[str, Any] = {}
    examples: dict[str, Any] = {}
    if "input_ids" in inputs:
        facts = describe_text(config.text_config, limit)
        ids = {"dtype": "int64", "shape": [_EXAMPLE_TEXTS[0], min(_EXAMPLE_TEXTS[1], limit)]}
        examples["input_ids"] = ids | {"low": 0, "high": config.text_config.vocab_size - 1}
        examples["attention_mask"] = ids | {"low": 1, "high": 1}
    if "pixel_values" in inputs:
        facts = describe_signal(config.vision_config) | facts | {"image_size": list(shape[1:])}
        examples["pixel_values"] = describe_example((1, *shape))
        facts |= {"example_inputs": examples}
    return facts | {"model_type": config.model_type, "projection_dim": config.projection_dim}


def _read(model: Any, outputs: tuple[str, ...], tensors: "Mapping[str, torch.Tensor]") -> "list[torch.Tensor]":
    """Run the model, or the half that the tensors are for, and return the outputs by the names of the tasks."""
    if set(_IMAGES) == set(tensors):
        result, vector = model.get_image_features(**tensors), "image_embedding"
    elif set(_TEXT) == set(tensors):
        result, vector = model.get_text_features(**tensors), "sentence_embedding"
    else:
        result, vector = model(**tensors), ""
    return [result["pooler_output" if name == vector else name] for name in outputs]


def _as_module(model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> "torch.nn.Module":
    """Wrap a model so that it takes the graph's inputs and returns the graph's outputs."""
    import torch

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, first: torch.Tensor, second: torch.Tensor | None = None, third: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, ...]:
            given = [value for value in (first, second, third) if value is not None]
            tensors = dict(zip(inputs, given, strict=True))
            if "attention_mask" in tensors:
                # The models take a mask of four dimensions as it is; one that adds needs no Where.
                mask = tensors["attention_mask"]
                places = mask.amax(0).clamp(1, 1).cumsum(0)
                hidden = (places[None, :] > places[:, None])[None, None] | (mask[:, None, None, :] == 0)
                tensors["attention_mask"] = hidden.to(torch.float32) * torch.finfo(torch.float32).min
            return tuple(_read(self.model, outputs, tensors))

    return Encoder().eval()


@dataclass(frozen=True)
class _Reference:
    """The PyTorch model, called as its users do."""

    model: Any
    outputs: tuple[str, ...]

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for the graph's inputs."""
        import torch

        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
            return [tensor.numpy() for tensor in _read(self.model, self.outputs, tensors)]


def _feeds(config: Any, limit: int, shape: tuple[int, ...]) -> Iterator[dict[str, np.ndarray]]:
    """Make random texts that end as a tokenizer ends them, padded to the longest, and random images."""
    rng = np.random.default_rng(0)
    for texts, longest, images in (*_PROVEN, (1, limit, 1)):
        length = min(longest, limit)
        lengths = np.maximum(1, length - np.arange(texts) * (length // max(2, texts)))
        places = np.arange(length)
        ids = rng.integers(0, config.vocab_size, (texts, length))
        ids = np.where(places < lengths[:, None] - 1, ids, config.eos_token_id)
        mask = (places < lengths[:, None]).astype(np.int64)
        pixels = rng.standard_normal((images, *shape), np.float32)
        yield {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
