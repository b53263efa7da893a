"""Random inputs for a model whose inputs no text makes, from what its manifest says of its example inputs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle


def random_inputs(bundle: ModelBundle, seed: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return an array for each input, of the example's type and shape, its values in the example's range."""
    rng = np.random.default_rng(seed)
    examples: Mapping[str, Mapping[str, Any]] = bundle.manifest.architecture["example_inputs"]
    return {name: _draw(rng, **example) for name, example in examples.items()}


def _draw(rng: np.random.Generator, dtype: str, shape: list[int], low: float, high: float) -> np.ndarray:
    if dtype.startswith("float"):
        return rng.uniform(low, high, shape).astype(dtype)
    return rng.integers(int(low), int(high), shape, endpoint=True).astype(dtype)
