"""AWQ: enlarge the input features that matter before rounding, by the power of their activations.

s[j] = rms(X[:, j])^alpha; X[:, j] / s[j] and W[:, j] * s[j] leave X W^T unchanged, and the rounding error of a
feature with large activations shrinks. For every place the alpha with the least error of the layers' outputs
|X W^T - X Q^T|^2 is taken, 0 (no change) among them, so no place gets worse on the calibration text.
Cost: one run over the text and `steps` quick roundings per layer, nothing at run time: s goes into the norms.
Choose it before rtn or gptq for int4.
Source: Lin et al. 2023, https://arxiv.org/abs/2306.00978
"""

from dataclasses import dataclass

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.fold import divide
from llmfast.graph.packed import Grid, to_blocks
from llmfast.quantize.workpiece import Workpiece

NEEDS_STATISTICS = True

_TINY = np.float32(1e-30)


@dataclass(frozen=True)
class Options:
    """Options of AWQ.

    Attributes:
        steps: alphas tried between 0 and 1, besides 0.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100:
            raise OptionError(f"steps {self.steps}: not between 1 and 100")


def transform(workpiece: Workpiece, options: Options) -> None:
    """Divide the activations of every site where that can be folded into the weights around it."""
    sites = {site.activations: site for site in workpiece.fold_sites()}
    for name, statistics in workpiece.measure(list(sites), gram=True):
        assert statistics.gram is not None
        gram, site = statistics.gram, sites[name]
        weights = [(workpiece.read(linear), workpiece.grid(linear)) for linear in site.linears]
        size = np.sqrt(np.diagonal(gram))
        known = size > 0
        if not known.any():
            continue
        best, least = None, np.inf
        for alpha in np.linspace(0, 1, options.steps + 1, dtype=np.float32):
            factors = np.ones_like(size)
            factors[known] = size[known] ** alpha
            factors /= np.sqrt(factors.max() * factors.min())
            error = sum(_output_error(weight, factors, grid, gram) for weight, grid in weights)
            if error < least:
                best, least = factors if alpha else None, error
        if best is not None:
            divide(workpiece.edits, site, best)


def _output_error(weight: np.ndarray, factors: np.ndarray, grid: Grid, gram: np.ndarray) -> float:
    """Return the mean squared error of a layer's outputs, summed over them, when its scaled weight is rounded."""
    difference = weight - _round(weight * factors, grid) / factors
    return float(np.einsum("nk,nk->", difference @ gram, difference))


def _round(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the weight rounded to nearest over each block's whole range."""
    blocks = to_blocks(weight, grid)
    if grid.symmetric:
        scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(grid.middle - 1) + _TINY
        rounded = np.rint(blocks / scale) * scale
    else:
        low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
        scale = (high - low) / np.float32(grid.largest) + _TINY
        zero = np.rint(low / scale)
        rounded = (np.clip(np.rint(blocks / scale) - zero, 0, grid.largest) + zero) * scale
    return np.asarray(rounded.reshape(len(weight), -1)[:, : weight.shape[1]])
