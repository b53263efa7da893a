"""Quantization-aware training: the forward pass sees weights as `quantize` will store them.

Before a step every quantized weight is replaced by the nearest one on its grid, and put back before the optimizer
moves it: the gradient at the rounded weight is taken for the weight's own (straight through). Scales and zero points
are found by the search of `quantize --method rtn`, over the same blocks, now and then; in between, weights are rounded
to those last found. Validations search anew: they measure what `quantize` would write.
Sources: Bengio et al. 2013, https://arxiv.org/abs/1308.3432; Liu et al. 2023, LLM-QAT, https://arxiv.org/abs/2305.17888
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import OptionError, UnsupportedError
from llmfast.graph.linear import MIN_EMBEDDING_ELEMENTS
from llmfast.graph.packed import Grid, QuantizedWeight
from llmfast.quantize.plan import FLOAT_BITS, Plan, block_wise_grid

if TYPE_CHECKING:
    import torch

# Steps between two searches of scales: a search costs a dozen passes over the weights, and they move slowly.
_SEARCH_EVERY = 16
_LARGEST_ACTIVATION = 127


def parse_scheme(typed: str) -> Plan:
    """Return the plan of `SCHEME[:KEY=VALUE,...]`.

    Raises:
        OptionError: an unknown scheme or option, or one whose weights are not on a grid.
    """
    scheme, _, settings = typed.partition(":")
    pairs = [one.partition("=") for one in settings.split(",") if one]
    plan = Plan.make(scheme, "", {key: value for key, _, value in pairs})
    if not isinstance(plan.grid, Grid):
        raise OptionError(f"--quantize-aware {scheme}: it rounds each value by itself", "int2, int4, int8 or w8")
    wanted = {"activations": "dynamic", "granularity": "token"}
    for name, value in wanted.items():
        if getattr(plan.scheme.options, name, value) != value:
            raise OptionError(f"--quantize-aware {typed}: activations are trained with a dynamic scale per token only")
    return plan


@dataclass
class _Target:
    """A weight on a grid, and the scales and zero points last found for it."""

    parameter: "torch.nn.Parameter"
    grid: Grid
    is_transposed: bool
    plan_rounds: bool
    scales: Any = None
    zero_points: Any = None


class FakeQuantizer:
    """Rounds the weights of a model while it computes.

    Args:
        model: its linear layers are rounded to the scheme's grid; its head and its large tables to 8-bit blocks, as
            `quantize` does.
        plan: scheme, and rounding to nearest.
    """

    def __init__(self, model: "torch.nn.Module", plan: Plan) -> None:
        self._plan = plan
        self._targets = _find_targets(model, plan)
        if not self._targets:
            raise UnsupportedError("--quantize-aware: the model has no linear layer", "leave it out")
        self._uses = 0
        self._is_active = False
        if isinstance(plan.grid, Grid) and not plan.grid.block_size:
            self._watch_activations(model)

    @contextmanager
    def rounded(self, search: bool = False) -> Iterator[None]:
        """Let the model have rounded weights while the body runs.

        Args:
            search: find scales anew, so that weights are those that `quantize` would write; otherwise now and then.
        """
        import torch

        anew = search or self._uses % _SEARCH_EVERY == 0
        self._uses += not search
        masters = [target.parameter.detach().clone() for target in self._targets]
        with torch.no_grad():
            for target in self._targets:
                target.parameter.copy_(self._searched(target) if anew else _round(target))
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False
            with torch.no_grad():
                for target, master in zip(self._targets, masters, strict=True):
                    target.parameter.copy_(master)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the last scales and zero points."""
        return {"uses": self._uses, "grids": [[target.scales, target.zero_points] for target in self._targets]}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self._uses = state["uses"]
        for target, (scales, zero_points) in zip(self._targets, state["grids"], strict=True):
            target.scales, target.zero_points = scales, zero_points

    def _searched(self, target: _Target) -> "torch.Tensor":
        """Round a weight as `quantize` does, and remember scales and zero points."""
        import torch

        array = target.parameter.detach().cpu().numpy()
        array = np.ascontiguousarray(array.T if target.is_transposed else array, np.float32)
        rounding = self._plan.rounding
        options = rounding.options if target.plan_rounds else rounding.plugin.Options()
        found: QuantizedWeight = rounding.plugin.quantize_weight(array, target.grid, options)
        device = target.parameter.device
        target.scales = torch.from_numpy(found.scales).to(device)
        middle = np.full(found.scales.shape, target.grid.middle, np.uint8)
        zeros = middle if found.zero_points is None else found.zero_points
        target.zero_points = torch.from_numpy(zeros).to(device, torch.float32)
        values = torch.from_numpy(np.ascontiguousarray(found.dequantize())).to(device)
        return values.T if target.is_transposed else values

    def _watch_activations(self, model: "torch.nn.Module") -> None:
        """Round the inputs of the layers whose products are of integers: a scale per token, straight through."""
        chosen = {id(target.parameter) for target in self._targets if not target.grid.block_size}

        def before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_round_rows(inputs[0]), *inputs[1:]) if self._is_active else inputs

        for module in model.modules():
            if id(getattr(module, "weight", None)) in chosen:
                module.register_forward_pre_hook(before)


def describe(plan: Plan) -> dict[str, Any]:
    """Return the scheme and its resolved options, for the lineage."""
    return {"scheme": plan.scheme.name, **asdict(plan.scheme.options)}


def _find_targets(model: "torch.nn.Module", plan: Plan) -> list[_Target]:
    import torch
    from transformers.pytorch_utils import Conv1D

    grid = plan.grid
    assert isinstance(grid, Grid)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = [one for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    linears = [one for one in model.modules() if isinstance(one, (torch.nn.Linear, Conv1D))]
    tied = {id(table.weight) for table in tables} & {id(linear.weight) for linear in linears}
    in_blocks = {id(one.weight) for one in tables if one.weight.numel() >= MIN_EMBEDDING_ELEMENTS} | tied
    in_blocks |= {id(head.weight)} if head is not None else set()
    keeps_blocks_float = plan.scheme.options.head_bits == FLOAT_BITS
    found: dict[int, _Target] = {}
    for module in (*linears, *tables):
        weight = module.weight
        if id(weight) in in_blocks:
            if not keeps_blocks_float:
                blocks = block_wise_grid(weight.shape[1], plan.scheme.options.head_bits)
                found[id(weight)] = _Target(weight, blocks, False, plan_rounds=False)
        elif not isinstance(module, torch.nn.Embedding):
            found[id(weight)] = _Target(weight, grid, isinstance(module, Conv1D), plan_rounds=True)
    return list(found.values())


def _round(target: _Target) -> "torch.Tensor":
    """Round a weight to the scales and zero points last found for it."""
    from torch.nn.functional import pad

    weight = target.parameter.detach().T if target.is_transposed else target.parameter.detach()
    rows, columns = weight.shape
    size = target.grid.block_size or columns
    blocks = pad(weight, (0, -columns % size)).reshape(rows, -1, size)
    scales, zeros = target.scales[..., None], target.zero_points[..., None]
    codes = (blocks / scales).round_().add_(zeros).clamp_(0, target.grid.largest)
    values = codes.sub_(zeros).mul_(scales).reshape(rows, -1)[:, :columns]
    return values.T if target.is_transposed else values


def _round_rows(hidden: "torch.Tensor") -> "torch.Tensor":
    """Round every token's features to 8 bits under its own scale; the gradient goes straight through."""
    wide = hidden.detach().float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / _LARGEST_ACTIVATION
    rounded = (wide / scale).round() * scale
    return hidden + (rounded - wide).to(hidden.dtype)
