"""What a layer is given, as methods need it, and how many of its weights are to go."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llmfast.prune.options import Pattern
from llmfast.quantize.calibrate import summarize


@dataclass(frozen=True)
class Inputs:
    """Statistics of a layer's input x, [tokens, K].

    Attributes:
        power: float32 [K], the mean of x^2 of each channel.
        gram: float32 [K, K], the mean of x x^T; None where no method asks for it.
    """

    power: np.ndarray
    gram: np.ndarray | None = None

    @classmethod
    def of(cls, samples: Iterable[np.ndarray], gram: bool) -> "Inputs":
        """Return the statistics of activations, float32 [..., K] each."""
        if gram:
            matrix = summarize(samples, gram=True).gram
            assert matrix is not None
            return cls(np.diagonal(matrix).copy(), matrix)
        sums, tokens = np.zeros(1, np.float64), 0
        for sample in samples:
            rows = sample.reshape(-1, sample.shape[-1])
            sums = sums + np.einsum("tk,tk->k", rows, rows)
            tokens += len(rows)
        return cls((sums / tokens).astype(np.float32))


@dataclass(frozen=True)
class Share:
    """Which share of a weight goes: one in so many anywhere, or all but N of each M in a row."""

    ratio: float
    pattern: Pattern | None = None
