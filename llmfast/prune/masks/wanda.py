"""Of each output's weights the ones with the smallest |w| x |x| become zero, x being the input's norm over a text.

No weight changes otherwise, and it costs one pass over the text. Later layers see what earlier ones have become.
Source: Sun et al. 2023, https://arxiv.org/abs/2306.11695
"""

from dataclasses import dataclass

import numpy as np

from llmfast.prune.graph.choose import smallest_of_groups, smallest_of_rows
from llmfast.prune.graph.inputs import Inputs, Share

NEEDS_INPUTS, NEEDS_GRAM = True, False


@dataclass(frozen=True)
class Options:
    """Wanda has no options."""


def prune_weight(weight: np.ndarray, share: Share, options: Options, inputs: Inputs | None, name: str) -> np.ndarray:
    """Return a weight, float32 [N, K], with zeros."""
    assert inputs is not None
    scores = np.abs(weight) * np.sqrt(inputs.power)
    mask = smallest_of_groups(scores, share.pattern) if share.pattern else smallest_of_rows(scores, share.ratio)
    return np.where(mask, np.float32(0), weight)
