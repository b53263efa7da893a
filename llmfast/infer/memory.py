"""How much memory many sequences take, said before they take it."""

from dataclasses import dataclass
from math import prod

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError, ResourceError
from llmfast.graph.feeds import DTYPES, PAST
from llmfast.infer.decoder import Decoder
from llmfast.resources import available_memory, is_forced

# The more rows a step has the fewer steps read the weights, but attention reads each row's own cache: with SmolLM2 on
# two cores 64 rows generate a tenth more than 32. `scripts/bench_batch.py --batch-sizes` compares.
DEFAULT_ROWS = 64
# Of the memory that is free, the share that is taken without being asked for.
_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """How many rows, and what they take.

    Attributes:
        rows: sequences at once.
        capacity: positions of each.
        cache_bytes: of the KV cache.
        model_bytes: of graph and weights.
        free_bytes: what could be had; None where the system does not say.
    """

    rows: int
    capacity: int
    cache_bytes: int
    model_bytes: int
    free_bytes: int | None

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f"; {_spell(self.free_bytes)} are free"
        return (
            f"{self.rows} rows of {self.capacity} positions: KV cache {_spell(self.cache_bytes)}, "
            f"model {_spell(self.model_bytes)}{free}"
        )


def plan_memory(
    bundle: ModelBundle,
    engine: Decoder,
    capacity: int,
    most_rows: int,
    batch_size: int | None = None,
    neighbours: int = 1,
    copies: int = 1,
) -> MemoryPlan:
    """Choose how many sequences run at once.

    Args:
        bundle: the model.
        engine: of the model, open.
        capacity: positions of a sequence.
        most_rows: rows that can be of use: as many as there are prompts, or what the engine has.
        batch_size: rows asked for; None takes `DEFAULT_ROWS`, or as many as fit half of the free memory.
        neighbours: processes that plan with the same free memory, this one included; each takes its share.
        copies: how often the model is open.

    Raises:
        OptionError: batch_size below 1.
        ResourceError: the rows asked for, or a single one, do not fit, and the user does not insist.
    """
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"--batch-size {batch_size}: must be at least 1")
    free = available_memory()
    free = None if free is None else free // neighbours
    row = capacity * sum(
        prod((entry.shape[1], entry.shape[3])) * np.dtype(DTYPES[entry.type]).itemsize
        for entry in engine.session.get_inputs()
        if entry.name.startswith(PAST)
    )
    rows = min(batch_size or DEFAULT_ROWS, max(most_rows, 1))
    if batch_size is None and free is not None:
        rows = max(1, min(rows, int(free * _SHARE) // max(row, 1)))
    plan = MemoryPlan(rows, capacity, rows * row, copies * bundle.size_bytes, free)
    if free is not None and plan.cache_bytes > free and not is_forced():
        raise ResourceError(
            f"not enough memory: {plan}",
            "shorter prompts or fewer --max-tokens" if rows == 1 else f"--batch-size {max(1, free // row)}",
        )
    return plan


def fits(size: int) -> bool:
    """Return whether so many bytes may be taken for what is not needed, only better."""
    free = available_memory()
    return free is None or size <= free * _SHARE


def _spell(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
