"""SmoothQuant: move the outliers of activations into the weights, where a scale per channel holds them.

s[j] = max|X[:, j]|^alpha / max|W[:, j]|^(1 - alpha); X[:, j] / s[j] and W[:, j] * s[j] leave X W^T unchanged.
Cost: one run over the calibration text for the maxima, nothing at run time: s goes into the norms.
Choose it before int8, whose activations have one scale per token.
Source: Xiao et al. 2022, https://arxiv.org/abs/2211.10438
"""

from dataclasses import dataclass

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.fold import divide
from llmfast.quantize.workpiece import Workpiece

NEEDS_STATISTICS = True


@dataclass(frozen=True)
class Options:
    """Options of SmoothQuant.

    Attributes:
        alpha: how much of the difficulty moves to the weights, from 0 to 1; 0 moves the weights' differences into the
            activations, it does not switch smoothing off.
    """

    alpha: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha {self.alpha}: not between 0 and 1")


def transform(workpiece: Workpiece, options: Options) -> None:
    """Divide the activations of every site where that can be folded into the weights around it."""
    sites = {site.activations: site for site in workpiece.fold_sites()}
    for name, statistics in workpiece.measure(list(sites)):
        activations = statistics.abs_max
        weights = np.max([np.abs(workpiece.read(linear)).max(0) for linear in sites[name].linears], axis=0)
        known = (activations > 0) & (weights > 0)
        factors = np.ones_like(activations)
        factors[known] = activations[known] ** options.alpha / weights[known] ** (1 - options.alpha)
        divide(workpiece.edits, sites[name], np.maximum(factors, np.float32(1e-5)))
