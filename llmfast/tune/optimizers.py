"""The optimizer, and its learning rate over time and over layers.

Source of the decay over layers: Howard, Ruder 2018, https://arxiv.org/abs/1801.06146
"""

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmfast.tune.options import TuneOptions

_MOMENTUM = 0.9
# What the lists of layers are called in transformers' models.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|(?:^|\.)w[tp]e\.")


def make_optimizer(model: "torch.nn.Module", options: "TuneOptions", learning_rate: float) -> Any:
    """Return the optimizer of a model's trainable parameters; only matrices decay.

    Its groups have a `share` of the learning rate, which is that of their layer.
    """
    import torch

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decay = options.layer_decay or 1.0
    shares = layer_shares(trained, decay) if decay < 1 else dict.fromkeys(trained, 1.0)
    parts: dict[tuple[float, bool], list[Any]] = {}
    for name, parameter in trained.items():
        parts.setdefault((shares[name], parameter.ndim > 1), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": options.weight_decay if are_matrices else 0.0, "share": share}
        for (share, are_matrices), parameters in parts.items()
    ]
    # One pass over memory per step in place of a dozen; sharded tensors have no such kernel.
    fused = options.parallel != "fsdp"
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=_MOMENTUM, fused=fused)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=learning_rate, fused=fused)


def layer_shares(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return each parameter's share of the learning rate: 1 for what lies above the layers, then less and less.

    Args:
        names: of the parameters.
        decay: a layer's share is the next one's times this; embeddings lie below the first.
    """
    found = {name: _LAYER.search(name) for name in names}
    top = 1 + max((int(match[1]) for match in found.values() if match), default=-1)
    depths = {
        name: int(match[1]) + 1 if match else 0 if _EMBEDDING.search(name) else top + 1 for name, match in found.items()
    }
    return {name: decay ** (top + 1 - depth) for name, depth in depths.items()}


def learning_rate_at(step: int, total: int, options: "TuneOptions", highest: float) -> float:
    """Return the learning rate of a step, from 0: it rises in a line, then falls along half a cosine or a line to 0."""
    warm = math.ceil(total * options.warmup)
    if step < warm:
        return highest * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if options.schedule == "cosine":
        return highest * 0.5 * (1 + math.cos(math.pi * done))
    return highest * (1 - done) if options.schedule == "linear" else highest
