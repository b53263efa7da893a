"""Proof that a traced encoder computes what PyTorch does, with the real weights, at shapes it was not traced at."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmfast.errors import GateError
from llmfast.export.encoder import first_line
from llmfast.export.pooling import Pooling, read_output
from llmfast.runtime import open_session

ABSOLUTE_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-3
_SHAPES = ((1, 1), (1, 7), (2, 16), (4, 64))  # batch, length; the longest the model takes comes on top
_LONGEST = 1024


@dataclass(frozen=True)
class Reference:
    """The PyTorch model, called as its users do: a mask of ones and zeros, defaults for the rest.

    Attributes:
        model: a `transformers` model in float32, not in training mode.
        outputs: names of the graph's outputs.
        pooling: how `sentence_embedding` is made, where that is an output.
    """

    model: Any
    outputs: tuple[str, ...]
    pooling: Pooling | None

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for int64 inputs [batch, seq], or an image's or a sound's float32 input."""
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with torch.inference_mode():
            result = self.model(**tensors)
            mask = tensors.get("attention_mask")
            return [read_output(result, name, mask, self.pooling).numpy() for name in self.outputs]


def prove_traced(
    reference: Reference, graph: Path, inputs: list[str], limit: int, threads: int | None = None
) -> dict[str, Any]:
    """Compare ONNX Runtime with PyTorch at several batch sizes and lengths, padding included.

    Args:
        reference: the PyTorch side.
        graph: the ONNX side.
        inputs: names of the graph's inputs.
        limit: the longest sequence the model takes.
        threads: threads of ONNX Runtime.

    Returns:
        `max_abs_diff`; `max_rel_diff`, over the largest value of the same output; `shapes`;
        `argmax_agreement` over the rows of `logits`, where there are any.

    Raises:
        GateError: a difference over the tolerance, or a value that is not a number.
    """
    rng = np.random.default_rng(0)
    shapes = sorted({(batch, min(length, limit)) for batch, length in (*_SHAPES, (1, _LONGEST))})
    samples = (_feeds(rng, shape, reference.model.config, inputs) for shape in shapes)
    return prove(reference, graph, samples, threads)


def prove_signals(
    reference: Reference, graph: Path, name: str, shapes: Sequence[tuple[int, ...]], threads: int | None = None
) -> dict[str, Any]:
    """Compare ONNX Runtime with PyTorch on noise with the mean and variance of normalized images and sound.

    Args:
        reference: the PyTorch side.
        graph: the ONNX side.
        name: the graph's input.
        shapes: of the inputs, batch first.
        threads: threads of ONNX Runtime.

    Returns:
        As `prove_traced` does.

    Raises:
        GateError: a difference over the tolerance, or a value that is not a number.
    """
    rng = np.random.default_rng(0)
    samples = ({name: rng.standard_normal(shape, np.float32)} for shape in shapes)
    return prove(reference, graph, samples, threads)


class Runnable(Protocol):
    """The PyTorch side of a comparison."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for the graph's inputs."""


def prove(
    reference: Runnable, graph: Path, samples: Iterable[dict[str, np.ndarray]], threads: int | None = None
) -> dict[str, Any]:
    """Compare ONNX Runtime with PyTorch on samples of inputs, see `prove_traced`."""
    session = open_session(graph, threads=threads)
    max_abs, max_rel = 0.0, 0.0
    agreed: list[bool] = []
    shapes = []
    for feeds in samples:
        different = list(dict.fromkeys(array.shape for array in feeds.values()))
        where = " and ".join("x".join(map(str, shape)) for shape in different)
        shapes.append(list(different[0]) if len(different) == 1 else [list(shape) for shape in different])
        try:
            actual = session.run(list(reference.outputs), feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise GateError(f"ONNX Runtime can't run the exported model at {where}: {first_line(error)}") from error
        for name, got, expected in zip(reference.outputs, actual, reference.run(feeds), strict=True):
            absolute, relative = compare(name, where, got, expected)
            max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
            if name.startswith("logits"):
                agreed += list(got.argmax(-1).ravel() == expected.argmax(-1).ravel())
    found = {"max_abs_diff": max_abs, "max_rel_diff": max_rel, "shapes": shapes}
    return found | ({"argmax_agreement": float(np.mean(agreed))} if agreed else {})


def _feeds(rng: np.random.Generator, shape: tuple[int, int], config: Any, inputs: list[str]) -> dict[str, np.ndarray]:
    """Make random texts; from the second on each is shorter than the one before it."""
    batch, length = shape
    lengths = np.maximum(1, length - np.arange(batch) * (length // max(2, batch)))
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(0, config.vocab_size, shape), config.pad_token_id or 0)
    types = rng.integers(0, max(1, getattr(config, "type_vocab_size", 1)), shape) * mask
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: every[name] for name in inputs}


def compare(name: str, where: str, actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return how far an output is from PyTorch's, absolutely and relative to its largest value.

    Args:
        name: the output's.
        where: the inputs' shape, for the message.
        actual: ONNX Runtime's.
        expected: PyTorch's.

    Raises:
        GateError: another shape, a difference over the tolerance, or a value that is not a number.
    """
    if actual.shape != expected.shape:
        raise GateError(f"export differs from PyTorch: `{name}` is {actual.shape}, expected {expected.shape}")
    if actual.size == 0:
        return 0.0, 0.0
    largest = float(np.abs(expected[np.isfinite(expected)]).max(initial=0))
    same = actual == expected  # also where both are infinite
    actual, expected = (np.where(same, 0, array).astype(np.float64) for array in (actual, expected))
    difference = np.abs(actual - expected)
    absolute = float(difference.max())
    relative = absolute / max(largest, float(np.finfo(np.float32).tiny))
    if not np.all(difference <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(expected)):
        raise GateError(
            f"export differs from PyTorch: `{name}` at {where}: by up to {absolute:.3g}, "
            f"{relative:.3g} of its largest value; "
            f"allowed {ABSOLUTE_TOLERANCE:g} + {RELATIVE_TOLERANCE:g} of each value",
            "nothing was written; please report the model",
        )
    return absolute, relative
