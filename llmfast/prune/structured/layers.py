"""Whole blocks go: the ones that change the residual stream least, or are missed least.

`influence`: 1 - mean cos(x, block(x)) over tokens (block influence; Men et al. 2024, ShortGPT,
https://arxiv.org/abs/2403.03853). `angular`: the run of blocks whose input and output point the same way
(Gromov et al. 2024, https://arxiv.org/abs/2403.17887). `loss`: one block after the other, each time the one without
which the calibration text is predicted best (Song et al. 2024, SLEB, https://arxiv.org/abs/2402.09025); for encoders,
without which the last hidden states turn least. It costs about blocks x blocks removed passes over `probe_samples`.
Fewer blocks make everything faster, prompt and decoding alike.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.bundle import TEXT_GENERATION
from llmfast.errors import OptionError, UnsupportedError
from llmfast.prune.checkpoint.families import PER_BLOCK, Family
from llmfast.prune.checkpoint.workpiece import Workpiece, tensors_of
from llmfast.report import note, progress

TAKES_RATIO = True
_SCORES = ("influence", "angular", "loss")


@dataclass(frozen=True)
class Options:
    """Options of dropping blocks.

    Attributes:
        score: how blocks are chosen: influence, angular or loss.
        probe_samples: calibration samples that `loss` is measured on.
        probe_tokens: tokens of each.
    """

    score: str = "influence"
    probe_samples: int = 4
    probe_tokens: int = 128

    def __post_init__(self) -> None:
        if self.score not in _SCORES:
            raise OptionError(f"layers: unknown score `{self.score}`", f"choose from: {', '.join(_SCORES)}")
        if self.probe_samples < 1 or self.probe_tokens < 2:
            raise OptionError("layers: `loss` needs at least one sample of two tokens")


def size_of(family: Family) -> str:
    """Return the config's field that gets smaller."""
    return "num_hidden_layers"


def resize(config: Any, family: Family, ratio: float, options: Options) -> dict[str, Any]:
    """Return the config's changes for a share of the blocks.

    Raises:
        OptionError: no block would stay.
    """
    blocks = int(config.num_hidden_layers)
    removed = round(ratio * blocks)
    if removed >= blocks:
        raise OptionError(f"ratio {ratio:g} removes all {blocks} blocks", "leave at least one")
    return {"num_hidden_layers": blocks - removed} if removed else {}


def prune(workpiece: Workpiece, changes: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Drop blocks; return which."""
    blocks = workpiece.num_blocks
    count = blocks - changes["num_hidden_layers"]
    if options.score == "loss":
        dropped = _missed_least(workpiece, count, options)
    else:
        dropped = _pass_on_most(workpiece, count, options.score)
    kept = [index for index in range(blocks) if index not in dropped]
    note(f"layers: {len(kept)} of {blocks} blocks stay, without {', '.join(map(str, sorted(dropped)))}")
    base = workpiece.block_name(0).removesuffix("0")

    def read(name: str, _: tuple[int, ...]) -> Any:
        if not name.startswith(base):
            return old[name]
        index, part = name.removeprefix(base).split(".", 1)
        return old[f"{base}{kept[int(index)]}.{part}"]

    old = tensors_of(workpiece.model)
    lists = {key: getattr(workpiece.config, key, None) for key in PER_BLOCK}
    lists = {key: [value[index] for index in kept] for key, value in lists.items() if isinstance(value, list)}
    workpiece.rebuild({**changes, **lists}, read)
    return {"dropped": sorted(dropped)}


def _pass_on_most(workpiece: Workpiece, count: int, score: str) -> list[int]:
    """Return the blocks that turn the residual stream least: one by one, or together as a run."""
    blocks = workpiece.num_blocks
    span = count if score == "angular" else 1
    if span > blocks - span + 1 and score == "angular":
        note(f"note: a run of {count} of {blocks} blocks leaves little to choose")
    sums = np.zeros(blocks - span + 1)
    tokens = 0
    with progress("measuring blocks", len(workpiece.samples)) as advance:
        for sample in workpiece.samples:
            states = workpiece.states(sample)
            for first in range(len(sums)):
                cosine = _cosines(states[first], states[first + span])
                angle = cosine if span == 1 and score == "influence" else -cosine.clamp(-1, 1).arccos() / math.pi
                sums[first] += float(angle.sum())
            tokens += len(sample)
            advance()
    scores = sums / tokens  # the larger, the less is changed
    order = np.argsort(-scores, kind="stable")
    if score == "angular":
        return list(range(int(order[0]), int(order[0]) + count))
    return [int(index) for index in order[:count]]


def _missed_least(workpiece: Workpiece, count: int, options: Options) -> list[int]:
    samples = [sample[: options.probe_tokens] for sample in workpiece.samples[: options.probe_samples]]
    samples = [sample for sample in samples if len(sample) > 1]
    if not samples:
        raise UnsupportedError("layers: `loss` needs samples of two tokens", "choose --set score=influence")
    reference = None if workpiece.task == TEXT_GENERATION else [_last_states(workpiece, one) for one in samples]
    dropped: list[int] = []
    left = list(range(workpiece.num_blocks))
    with progress("measuring blocks", sum(len(left) - done for done in range(count))) as advance:
        while len(dropped) < count:
            losses = []
            for index in left:
                with contextlib.ExitStack() as stack:
                    for one in (*dropped, index):
                        stack.enter_context(workpiece.skipping(one))
                    losses.append(_loss(workpiece, samples, reference))
                advance()
            dropped.append(left.pop(int(np.argmin(losses))))
    return dropped


def _loss(workpiece: Workpiece, samples: Sequence[np.ndarray], reference: Sequence[Any] | None) -> float:
    """Return the mean -log p of the next token, or of an encoder 1 - cos of the last hidden states."""
    import torch

    total, tokens = 0.0, 0
    for number, sample in enumerate(samples):
        if reference is None:
            logits = workpiece.run(sample).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample[1:]), reduction="sum"))
        else:
            total += float((1 - _cosines(_last_states(workpiece, sample), reference[number])).sum())
        tokens += len(sample)
    return total / tokens


def _last_states(workpiece: Workpiece, sample: np.ndarray) -> Any:
    return workpiece.states(sample)[-1]


def _cosines(left: Any, right: Any) -> Any:
    """Return the cosine of each token, float64 [tokens]."""
    import torch

    return torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=-1)
