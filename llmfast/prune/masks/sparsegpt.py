"""Weights become zero one input feature after the other, and those to come make up for the error.

In blocks of columns, the weights with the smallest w^2 / U[j, j]^2 go, where U is the upper Cholesky factor of
(X^T X + damp I)^-1; the error of column j, divided by U[j, j], times row j of U is taken from the columns to come.
Cost: K^3 per layer; memory: K^2.
Source: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774
"""

from dataclasses import dataclass

import numpy as np

from llmfast.errors import OptionError
from llmfast.prune.graph.choose import smallest_of_all, smallest_of_groups
from llmfast.prune.graph.inputs import Inputs, Share
from llmfast.quantize.hessian import inverse_factor
from llmfast.report import note

NEEDS_INPUTS = NEEDS_GRAM = True


@dataclass(frozen=True)
class Options:
    """Options of SparseGPT.

    Attributes:
        damping: added to the diagonal of X^T X, as a share of its mean; ten times more when it is singular.
        columns: features that are chosen from together.
    """

    damping: float = 0.01
    columns: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise OptionError(f"damping {self.damping}: not between 0 and 1")
        if self.columns < 1:
            raise OptionError(f"columns {self.columns}: must be at least 1")


def prune_weight(weight: np.ndarray, share: Share, options: Options, inputs: Inputs | None, name: str) -> np.ndarray:
    """Return a weight, float32 [N, K], with zeros and with what makes up for them."""
    assert inputs is not None
    assert inputs.gram is not None
    factor = inverse_factor(inputs.gram, options.damping)
    if factor is None:
        note(f"warning: layer `{name}`: its inputs have singular statistics: the smallest weights go")
        factor = np.eye(weight.shape[1], dtype=np.float32)
    rest = np.array(weight.T, np.float32, order="C")  # [K, N]
    features, rows = rest.shape
    step = options.columns
    if share.pattern:
        step = max(share.pattern.group, step // share.pattern.group * share.pattern.group)
    for start in range(0, features, step):
        stop = min(start + step, features)
        pivots = np.diagonal(factor)[start:stop]
        mask = None
        if share.pattern is None:
            # Of all columns so far as many as were asked for, to the last one.
            count = round(share.ratio * stop * rows) - round(share.ratio * start * rows)
            mask = smallest_of_all(np.square(rest[start:stop] / pivots[:, None]), count / ((stop - start) * rows))
        errors = np.empty((stop - start, rows), np.float32)
        for column in range(start, stop):
            if share.pattern and (column - start) % share.pattern.group == 0:
                group = slice(column, min(column + share.pattern.group, stop))
                scores = np.square(rest[group] / np.diagonal(factor)[group, None])
                chosen = smallest_of_groups(scores.T, share.pattern).T
                mask = chosen if column == start else np.concatenate([mask, chosen])
            assert mask is not None
            kept = np.where(mask[column - start], np.float32(0), rest[column])
            error = (rest[column] - kept) / factor[column, column]
            rest[column] = kept
            rest[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
            errors[column - start] = error
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(rest.T)
