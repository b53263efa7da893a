"""The optimizer and its learning rate over time."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmfast.tune.options import TuneOptions

_MOMENTUM = 0.9


def make_optimizer(model: "torch.nn.Module", options: "TuneOptions", learning_rate: float) -> Any:
    """Return the optimizer of a model's trainable parameters; only matrices decay."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One pass over memory per step in place of a dozen; sharded tensors have no such kernel.
    fused = options.parallel != "fsdp"
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=_MOMENTUM, fused=fused)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=learning_rate, fused=fused)


def learning_rate_at(step: int, total: int, options: "TuneOptions", highest: float) -> float:
    """Return the learning rate of a step, from 0: it rises in a line, then falls along half a cosine or a line to 0."""
    warm = math.ceil(total * options.warmup)
    if step < warm:
        return highest * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if options.schedule == "cosine":
        return highest * 0.5 * (1 + math.cos(math.pi * done))
    return highest * (1 - done) if options.schedule == "linear" else highest
