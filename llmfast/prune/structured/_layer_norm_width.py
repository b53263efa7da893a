"""Fewer hidden channels of an encoder whose norms come after its blocks (BERT), and fewer heads with them.

The channels that go are gone from every table, layer and norm. Layers that read the stream are refitted by least
squares; each norm, whose mean and deviation are over fewer channels now, gets the scale and bias that come nearest
to its old outputs, channel by channel. Heads keep their width, for the config says it by hidden size / heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.prune.checkpoint.compensate import group_losses, group_outputs, keep_inputs, largest
from llmfast.prune.checkpoint.families import head_size
from llmfast.prune.checkpoint.workpiece import Workpiece

if TYPE_CHECKING:
    import torch


def cut_layer_norm_model(workpiece: Workpiece, changes: Mapping[str, Any]) -> None:
    """Cut the hidden size and the number of heads."""
    import torch

    family, width = workpiece.family, head_size(workpiece.config)
    blocks = range(workpiece.num_blocks)
    readers = [
        [workpiece.block_name(index, part) for part in (family.queries, family.keys, family.values)] for index in blocks
    ]
    inputs = [workpiece.block_name(index, family.mlp_inputs[0]) for index in blocks]
    grams = dict(workpiece.grams([*(names[0] for names in readers), *inputs]))
    channels = _strongest(workpiece, readers, inputs, grams, changes["hidden_size"])
    heads: dict[str, np.ndarray] = {}
    replaced: dict[str, torch.Tensor] = {}
    outputs = [workpiece.block_name(index, family.attention_output) for index in blocks]
    for names, (output, gram) in zip(readers, workpiece.grams(outputs), strict=True):
        weight = workpiece.read(f"{output}.weight")
        kept = largest(group_losses(weight, gram, width), changes["num_attention_heads"])
        rows = (kept[:, None] * width + np.arange(width)).reshape(-1)
        rows_of_output = torch.from_numpy(channels)
        replaced[f"{output}.weight"] = keep_inputs(weight, gram, rows, True)[rows_of_output]
        heads |= dict.fromkeys(names, rows)
        for name in names:
            fitted = keep_inputs(workpiece.read(f"{name}.weight"), grams[names[0]], channels, True)
            replaced[f"{name}.weight"] = fitted[torch.from_numpy(rows)]
    for name in inputs:
        replaced[f"{name}.weight"] = keep_inputs(workpiece.read(f"{name}.weight"), grams[name], channels, True)
    replaced |= _refit_norms(workpiece, channels)
    workpiece.cut(changes, lambda name, dim: heads.get(name.rpartition(".")[0], channels), replaced)


def _strongest(
    workpiece: Workpiece,
    readers: "list[list[str]]",
    inputs: list[str],
    grams: "Mapping[str, torch.Tensor]",
    count: int,
) -> np.ndarray:
    """Return the channels that attention and MLPs get most from, every layer counted alike."""
    import torch

    scores = torch.zeros(workpiece.config.hidden_size, dtype=torch.float64)
    for names in [*readers, *([name] for name in inputs)]:
        for name in names:
            parts = group_outputs(workpiece.read(f"{name}.weight"), grams[names[0]], 1)
            scores += parts / parts.sum()
    return largest(scores, count)


@dataclass
class _Fit:
    """Sums over tokens, per channel: of the new norm's outputs u without scale, and of the old norm's outputs v."""

    u: "torch.Tensor"
    v: "torch.Tensor"
    uu: "torch.Tensor"
    uv: "torch.Tensor"
    tokens: int = 0

    def line(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return scale and bias of the line from u to v."""
        mean_u, mean_v = self.u / self.tokens, self.v / self.tokens
        variance = (self.uu / self.tokens - mean_u.square()).clamp(min=1e-12)
        scale = (self.uv / self.tokens - mean_u * mean_v) / variance
        return scale.float(), (mean_v - scale * mean_u).float()


def _refit_norms(workpiece: Workpiece, channels: np.ndarray) -> "dict[str, torch.Tensor]":
    import torch

    width = workpiece.config.hidden_size
    norms = {
        name: module
        for name, module in workpiece.model.base_model.named_modules()
        if isinstance(module, torch.nn.LayerNorm) and tuple(module.normalized_shape) == (width,)
    }
    chosen = torch.from_numpy(channels)
    prefix = "" if workpiece.model.base_model is workpiece.model else f"{workpiece.model.base_model_prefix}."
    fits = {name: _Fit(*(torch.zeros(len(channels), dtype=torch.float64) for _ in range(4))) for name in norms}

    def see(fit: _Fit, norm: Any) -> "Callable[[torch.Tensor], None]":
        def add(rows: torch.Tensor) -> None:
            old = torch.nn.functional.layer_norm(rows, (width,), norm.weight, norm.bias, norm.eps)
            v = old[:, chosen].double()
            u = torch.nn.functional.layer_norm(rows[:, chosen], (len(channels),), eps=norm.eps).double()
            fit.u += u.sum(0)
            fit.v += v.sum(0)
            fit.uu += u.square().sum(0)
            fit.uv += (u * v).sum(0)
            fit.tokens += len(rows)

        return add

    workpiece.observe({prefix + name: see(fits[name], norm) for name, norm in norms.items()}, "calibrating norms")
    lines = {prefix + name: fit.line() for name, fit in fits.items()}
    return {f"{name}.weight": scale for name, (scale, _) in lines.items()} | {
        f"{name}.bias": bias for name, (_, bias) in lines.items()
    }
