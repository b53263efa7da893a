"""SmoothQuant: move the outliers of activations into the weights, where a scale per channel holds them.

s[j] = max|X[:, j]|^alpha / max|W[:, j]|^(1 - alpha); X[:, j] / s[j] and W[:, j] * s[j] leave X W^T unchanged.
Cost: one run over the calibration text for the maxima, nothing at run time: s goes into the norms.
Choose it before int8, whose activations have one scale per token.
Source: Xiao et al. 2022, https://arxiv.org/abs/2211.10438
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.fold import FoldSite, Rescaling
from llmfast.graph.linear import Linear
from llmfast.quantize.calibrate import Statistics


@dataclass(frozen=True)
class Options:
    """Options of SmoothQuant.

    Attributes:
        alpha: how much of the difficulty moves to the weights; 0 leaves it all in the activations.
    """

    alpha: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha {self.alpha}: not between 0 and 1")


def transform(
    sites: list[FoldSite],
    statistics: dict[str, Statistics],
    read: Callable[[Linear], np.ndarray],
    rescaling: Rescaling,
    options: Options,
) -> None:
    """Add the factors of every site to `rescaling`.

    Args:
        sites: where activations can be rescaled.
        statistics: of each site's activations.
        read: returns a layer's weight [N, K] as it is now.
        rescaling: is changed in place.
        options: see `Options`.
    """
    for site in sites:
        activations = statistics[site.activations].abs_max
        weights = np.max([np.abs(read(linear)).max(0) for linear in site.linears], axis=0)
        known = (activations > 0) & (weights > 0)
        factors = np.ones_like(activations)
        factors[known] = activations[known] ** options.alpha / weights[known] ** (1 - options.alpha)
        rescaling.divide(site, np.maximum(factors, np.float32(1e-5)))
