"""Shares of zeros that follow from how much each layer's outputs would lose.

A weight's loss is w^2 E[x^2], as a share of its layer's output power. One threshold on it for all layers says how
many go of each, kept near the average as in OWL (Yin et al. 2023, https://arxiv.org/abs/2310.05175), for beyond that
single layers break.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SPREAD = 0.1  # how far a layer's share may be from the average
_QUANTILES = 1001
_STEPS = 60


@dataclass(frozen=True)
class Losses:
    """What a layer's weights are worth.

    Attributes:
        num_parameters: how many there are.
        quantiles: float64 [1001], of the logarithm of their losses.
    """

    num_parameters: int
    quantiles: np.ndarray

    @classmethod
    def of(cls, weight: np.ndarray, power: np.ndarray) -> "Losses":
        """Measure a weight, float32 [N, K], given the mean square of its input's channels [K]."""
        losses = np.square(weight, dtype=np.float32) * power
        losses /= max(float(losses.sum(dtype=np.float64)), 1e-30)
        logarithms = np.log(np.maximum(losses, 1e-38), dtype=np.float32)
        return cls(weight.size, np.quantile(logarithms, np.linspace(0, 1, _QUANTILES)).astype(np.float64))


def allocate(layers: Mapping[str, Losses], ratio: float) -> dict[str, float]:
    """Return each layer's share of zeros; their average, weighed by parameters, is `ratio`."""
    levels = np.linspace(0, 1, _QUANTILES)
    low, high = max(0.0, ratio - SPREAD), min(0.99, max(ratio, ratio + SPREAD))
    total = sum(one.num_parameters for one in layers.values())

    def shares_at(threshold: float) -> dict[str, float]:
        return {
            name: float(np.clip(np.interp(threshold, one.quantiles, levels), low, high)) for name, one in layers.items()
        }

    def average(shares: Mapping[str, float]) -> float:
        return sum(shares[name] * one.num_parameters for name, one in layers.items()) / total

    bottom = min(float(one.quantiles[0]) for one in layers.values()) - 1
    top = max(float(one.quantiles[-1]) for one in layers.values()) + 1
    for _ in range(_STEPS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if average(shares_at(middle)) < ratio else (bottom, middle)
    return shares_at(top)
