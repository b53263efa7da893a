"""Attention heads go, in every block the same number: a key and value head with the queries that share it.

With grouped queries whole groups go, so that every key head keeps as many queries as before. A model with one key
head loses queries instead. Heads are chosen and the output layer is refitted as `ffn` does with channels.
BERT's config says how wide a head is by hidden size / heads, so there heads go with `width` only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.errors import OptionError, UnsupportedError
from llmfast.prune.checkpoint.compensate import group_losses, group_outputs, keep_inputs, largest
from llmfast.prune.checkpoint.families import Family, head_size, num_kv_heads
from llmfast.prune.checkpoint.workpiece import Workpiece
from llmfast.report import note, progress

TAKES_RATIO = True
_SCORES = ("loss", "output")
_DIVIDING = ("llama", "gemma2")


@dataclass(frozen=True)
class Options:
    """Options of removing heads.

    Attributes:
        score: how heads are chosen: loss or output, see `ffn`.
        compensate: refit the layer that reads them.
    """

    score: str = "loss"
    compensate: bool = True

    def __post_init__(self) -> None:
        if self.score not in _SCORES:
            raise OptionError(f"heads: unknown score `{self.score}`", f"choose from: {', '.join(_SCORES)}")


def size_of(family: Family) -> str:
    """Return the config's field that gets smaller."""
    return "num_attention_heads"


def resize(config: Any, family: Family, ratio: float, options: Options) -> dict[str, Any]:
    """Return the config's changes for a share of the heads.

    Raises:
        OptionError: no head would stay.
        UnsupportedError: a config without a head size of its own.
    """
    if not family.has_head_size:
        raise UnsupportedError(
            f"heads of a `{config.model_type}` can't go alone: its config says their width by hidden size / heads",
            "`width` removes hidden channels and heads together",
        )
    heads, groups = int(config.num_attention_heads), num_kv_heads(config)
    units = groups if groups > 1 else heads
    wanted = (1 - ratio) * units
    if ratio and round(wanted) < 1:
        raise OptionError(
            f"ratio {ratio:g} removes all {heads} heads", f"they go in steps of {heads // units} of {heads}"
        )
    fitting = [count for count in range(1, units + 1) if _fits(config, count * heads // units)]
    kept = min(fitting, key=lambda count: (abs(count - wanted), count))
    if kept == units:
        return {}
    return {
        "num_attention_heads": kept * heads // units,
        "num_key_value_heads": kept if groups > 1 else 1,
        "head_dim": head_size(config),
    }


def _fits(config: Any, heads: int) -> bool:
    """Return whether a config takes so many heads: some insist that they divide the hidden size, for no use of it."""
    return config.model_type not in _DIVIDING or config.hidden_size % heads == 0


def prune(workpiece: Workpiece, changes: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Remove heads from every block."""
    family, config = workpiece.family, workpiece.config
    heads, groups, width = int(config.num_attention_heads), num_kv_heads(config), head_size(config)
    units = groups if groups > 1 else heads
    size = heads // units * width
    count = changes["num_attention_heads"] * width // size
    blocks = range(workpiece.num_blocks)
    names = [workpiece.block_name(index, family.attention_output) for index in blocks]
    chosen: dict[str, np.ndarray] = {}
    replaced = {}
    with progress("choosing heads", len(blocks)) as advance:
        for index, (name, gram) in zip(blocks, workpiece.grams(names), strict=True):
            weight = workpiece.read(f"{name}.weight")
            score = group_losses if options.score == "loss" else group_outputs
            kept = largest(score(weight, gram, size), count)
            queries, keys = spread(kept, size), spread(kept, width)
            replaced[f"{name}.weight"] = keep_inputs(weight, gram, queries, options.compensate)
            chosen[workpiece.block_name(index, family.queries)] = queries
            chosen[workpiece.block_name(index, family.keys)] = keys
            chosen[workpiece.block_name(index, family.values)] = keys
            advance()
    note(
        f"heads: {count * heads // units} of {heads} query heads"
        + (f" and {count} of {groups} key and value heads" if groups > 1 else "")
        + f" stay in each of {len(blocks)} blocks"
    )
    workpiece.cut(changes, lambda name, dim: chosen.get(name.rpartition(".")[0]) if dim == 0 else None, replaced)
    return {"num_attention_heads": changes["num_attention_heads"]}


def spread(units: np.ndarray, size: int) -> np.ndarray:
    """Return the channels of units that have `size` of them each."""
    channels: np.ndarray = (units[:, None] * size + np.arange(size)).reshape(-1)
    return channels
