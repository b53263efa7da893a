"""Channels of the MLPs go, in every block the same number, for a plain config has one size for all.

`loss`: what the block's output loses when the other channels stand in as well as they can (optimal brain surgeon).
`output`: the norm of what the channel adds to it. `activation`: the norm of its activation alone.
With `compensate` the layer after them is refitted by least squares to the channels that stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.errors import OptionError
from llmfast.prune.checkpoint.compensate import group_losses, group_outputs, keep_inputs, largest
from llmfast.prune.checkpoint.families import Family
from llmfast.prune.checkpoint.workpiece import Workpiece
from llmfast.report import note, progress

TAKES_RATIO = True
_SCORES = ("loss", "output", "activation")


@dataclass(frozen=True)
class Options:
    """Options of removing MLP channels.

    Attributes:
        score: how channels are chosen: loss, output or activation.
        compensate: refit the layer that reads them.
        multiple_of: the number of channels that stay is rounded to a multiple of it.
    """

    score: str = "loss"
    compensate: bool = True
    multiple_of: int = 8

    def __post_init__(self) -> None:
        if self.score not in _SCORES:
            raise OptionError(f"ffn: unknown score `{self.score}`", f"choose from: {', '.join(_SCORES)}")
        if self.multiple_of < 1:
            raise OptionError(f"ffn: multiple_of {self.multiple_of}: must be at least 1")


def size_of(family: Family) -> str:
    """Return the config's field that gets smaller."""
    return family.intermediate_size


def resize(config: Any, family: Family, ratio: float, options: Options) -> dict[str, Any]:
    """Return the config's changes for a share of the channels.

    Raises:
        OptionError: no channel would stay.
    """
    channels = int(getattr(config, family.intermediate_size))
    step = options.multiple_of
    kept = min(channels, round((1 - ratio) * channels / step) * step) if ratio else channels
    if kept < 1:
        raise OptionError(f"ratio {ratio:g} removes all {channels} channels", f"they go in steps of {step}")
    return {family.intermediate_size: kept} if kept < channels else {}


def prune(workpiece: Workpiece, changes: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Remove channels from every MLP."""
    family = workpiece.family
    ((_, count),) = changes.items()
    blocks = range(workpiece.num_blocks)
    names = [workpiece.block_name(index, family.mlp_output) for index in blocks]
    chosen: dict[str, np.ndarray] = {}
    replaced = {}
    with progress("choosing channels", len(blocks)) as advance:
        for index, (name, gram) in zip(blocks, workpiece.grams(names), strict=True):
            weight = workpiece.read(f"{name}.weight")
            kept = largest(_scores(weight, gram, options.score), count)
            replaced[f"{name}.weight"] = keep_inputs(weight, gram, kept, options.compensate)
            for part in family.mlp_inputs:
                chosen[workpiece.block_name(index, part)] = kept
            advance()
    before = getattr(workpiece.config, family.intermediate_size)
    note(f"ffn: {count} of {before} channels stay in each of {len(blocks)} blocks")
    workpiece.cut(changes, lambda name, dim: chosen.get(name.rpartition(".")[0]) if dim == 0 else None, replaced)
    return {family.intermediate_size: count}


def _scores(weight: Any, gram: Any, score: str) -> Any:
    if score == "activation":
        return gram.diagonal().double()
    return (group_losses if score == "loss" else group_outputs)(weight, gram, 1)
