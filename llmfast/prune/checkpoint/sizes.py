"""How large a model of some config is, and the shares that methods take from it; no weight is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmfast import registry
from llmfast.bundle import TEXT_GENERATION
from llmfast.errors import OptionError
from llmfast.export.reference import parameters_on_meta
from llmfast.prune.checkpoint.families import family_of
from llmfast.prune.checkpoint.workpiece import changed_config
from llmfast.prune.methods import ratio_of
from llmfast.quantize.plan import Choice
from llmfast.report import note

_SEARCH_STEPS = 24
_LARGEST_RATIO = 0.95


@dataclass(frozen=True)
class Sizes:
    """Trained values of a model.

    Attributes:
        num_parameters: all of them, what is shared counted once.
        blocks: those of the blocks, which a prompt goes through.
        head: those of a decoder's head, which every new token reads as well.
    """

    num_parameters: int
    blocks: int
    head: int

    def expected_speedups(self, before: "Sizes") -> dict[str, float]:
        """Return what speed would follow from the multiplications alone."""
        if not before.head:
            return {"expected_speedup": before.blocks / self.blocks}
        return {
            "expected_prefill_speedup": before.blocks / self.blocks,
            "expected_decode_speedup": (before.blocks + before.head) / (self.blocks + self.head),
        }


def sizes_of(config: Any, task: str, source: str) -> Sizes:
    """Count the parameters of a config's model."""
    import torch
    import transformers

    auto_model = getattr(transformers, registry.load("tasks", task).AUTO_MODEL)
    with parameters_on_meta():
        model = auto_model.from_config(config, dtype=torch.float32)
    model.tie_weights()
    blocks = model.base_model.get_submodule(family_of(config, source).blocks)
    head = model.lm_head.weight.numel() if task == TEXT_GENERATION else 0
    return Sizes(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in blocks.parameters()),
        int(head),
    )


@dataclass(frozen=True)
class Shrinking:
    """What some shares make of a config.

    Attributes:
        ratios: method -> its share.
        config: the config after all methods.
        sizes: of its model.
    """

    ratios: Mapping[str, float]
    config: Any
    sizes: Sizes


class Shrinker:
    """Finds shares.

    Args:
        config: the original.
        task: what the model is for.
        source: the checkpoint's name in messages.
        choices: methods in order.
    """

    def __init__(self, config: Any, task: str, source: str, choices: Sequence[Choice]) -> None:
        self._config, self._task, self._source = config, task, source
        self._takers = [choice for choice in choices if choice.plugin.TAKES_RATIO]
        self._counted: dict[str, Sizes] = {}

    def shrink(self, ratios: Mapping[str, float]) -> Shrinking:
        """Return what shares make of the config.

        Raises:
            OptionError: a share that leaves nothing.
        """
        config = self._config
        family = family_of(config, self._source)
        for choice in self._takers:
            changes = choice.plugin.resize(config, family, ratio_of(choice, ratios), choice.options)
            config = changed_config(config, changes) if changes else config
        key = repr([(name, getattr(config, name)) for name in ("num_hidden_layers", "hidden_size")]) + repr(
            [getattr(config, family.intermediate_size), config.num_attention_heads, config.tie_word_embeddings]
        )
        if key not in self._counted:
            self._counted[key] = sizes_of(config, self._task, self._source)
        return Shrinking({one.name: ratio_of(one, ratios) for one in self._takers}, config, self._counted[key])

    def fit(self, target: float, fixed: Mapping[str, float] | None = None) -> Shrinking:
        """Return the smallest shares, one for all methods, that leave at most so many parameters.

        Args:
            target: parameters; below 1 a share of those there are.
            fixed: shares of some methods that are decided.

        Raises:
            OptionError: the methods can't take so much.
        """
        fixed = fixed or {}
        limit = target * self.shrink({}).sizes.num_parameters if target < 1 else target
        takers = [one.name for one in self._takers if one.name not in fixed]

        def fits(ratios: Mapping[str, float]) -> bool:
            try:
                return self.shrink(ratios).sizes.num_parameters <= limit
            except OptionError:
                return True  # so much that nothing would be left

        common = _smallest(lambda ratio: fits({**fixed, **dict.fromkeys(takers, ratio)}))
        ratios = {**fixed, **dict.fromkeys(takers, common)}
        # Blocks and heads go in large steps: the last method gives back what the others took too much.
        last = takers[-1]
        ratios[last] = _smallest(lambda ratio: fits({**ratios, last: ratio}))
        try:
            found = self.shrink(ratios)
        except OptionError as error:
            raise OptionError(f"{target_text(target)} parameters: {error.message}", error.hint) from error
        if found.sizes.num_parameters > limit:
            least = self.shrink(dict.fromkeys(takers, 0.0) | ratios).sizes.num_parameters
            raise OptionError(
                f"{', '.join(takers)} can't leave as few as {limit:,.0f} parameters, {least:,} at least",
                "add another method, or ask for more",
            )
        return found

    def first_shares(self) -> list[float]:
        """Return the shares worth trying of the first method: every step of it up to a half, ten at most."""
        first = self._takers[0].name
        seen, shares = set(), []
        for percent in range(0, 51):
            ratio = percent / 100
            try:
                count = self.shrink({**dict.fromkeys([one.name for one in self._takers], 0.0), first: ratio})
            except OptionError:
                break
            if count.sizes.num_parameters not in seen:
                seen.add(count.sizes.num_parameters)
                shares.append(ratio)
        stride = math.ceil(len(shares) / 10)
        return shares[::stride]


def choose_allocation(
    shrinker: Shrinker, first: str, target: float, loss_of: Callable[[Shrinking], float]
) -> Shrinking:
    """Return the division of a target between the first method and the others that loses least.

    Args:
        shrinker: knows the methods.
        first: the first one.
        target: parameters, or a share of them.
        loss_of: measures a division.
    """
    tried: list[tuple[float, Shrinking]] = []
    for share in shrinker.first_shares():
        try:
            candidate = shrinker.fit(target, {first: share})
        except OptionError:
            continue
        if any(candidate.config.to_dict() == other.config.to_dict() for _, other in tried):
            continue
        loss = loss_of(candidate)
        spelled = ", ".join(f"{name} {ratio:.1%}" for name, ratio in candidate.ratios.items())
        note(f"{spelled}: {candidate.sizes.num_parameters:,} parameters, loss {loss:.4f}")
        tried.append((loss, candidate))
    if not tried:
        raise OptionError(f"{target_text(target)} parameters: the methods can't take so much", "ask for more")
    return min(tried, key=lambda pair: pair[0])[1]


def target_text(target: float) -> str:
    """Spell a target as it was typed."""
    return f"{target:.0%}" if target < 1 else f"{target:,.0f}"


def _smallest(holds: Callable[[float], bool]) -> float:
    """Return the smallest share for which something holds that holds for all larger ones; the largest if for none."""
    if holds(0.0):
        return 0.0
    low, high = 0.0, _LARGEST_RATIO
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
