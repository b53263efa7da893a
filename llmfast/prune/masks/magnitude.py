"""The smallest weights of each layer become zero, whatever they are multiplied with.

Needs no text. The baseline that other methods must beat.
"""

from dataclasses import dataclass

import numpy as np

from llmfast.prune.graph.choose import smallest_of_all, smallest_of_groups
from llmfast.prune.graph.inputs import Inputs, Share

NEEDS_INPUTS = NEEDS_GRAM = False


@dataclass(frozen=True)
class Options:
    """Magnitude has no options."""


def prune_weight(weight: np.ndarray, share: Share, options: Options, inputs: Inputs | None, name: str) -> np.ndarray:
    """Return a weight, float32 [N, K], with zeros."""
    scores = np.abs(weight)
    mask = smallest_of_groups(scores, share.pattern) if share.pattern else smallest_of_all(scores, share.ratio)
    return np.where(mask, np.float32(0), weight)
