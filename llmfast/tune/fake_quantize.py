"""Quantization-aware training: the forward pass sees weights on the grid that `quantize` will store them on.

Training starts at the weights that GPTQ finds for the inputs of the first rows. Before a step every quantized weight
is replaced by the nearest one on its grid, and put back before the optimizer moves it: the gradient at the rounded
weight is taken for the weight's own (straight through). Scales follow the weights: each is the least-squares fit to
the codes of its block. In the end the rounded weights are kept, and `quantize --method rtn` takes them as they are.
Sources: Bengio et al. 2013, https://arxiv.org/abs/1308.3432; Liu et al. 2023, LLM-QAT, https://arxiv.org/abs/2305.17888;
Frantar et al. 2022, GPTQ, https://arxiv.org/abs/2210.17323
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import OptionError, UnsupportedError
from llmfast.graph.linear import MIN_EMBEDDING_ELEMENTS
from llmfast.graph.packed import Grid, QuantizedWeight, storable_scales
from llmfast.quantize.calibrate import Statistics
from llmfast.quantize.plan import FLOAT_BITS, Plan, block_wise_grid
from llmfast.quantize.rounding import gptq, rtn

if TYPE_CHECKING:
    import torch

_LARGEST_ACTIVATION = 127


def parse_scheme(typed: str) -> Plan:
    """Return the plan of `SCHEME[:KEY=VALUE,...]`.

    Raises:
        OptionError: an unknown scheme or option, or one whose weights are not on a grid.
    """
    scheme, _, settings = typed.partition(":")
    pairs = [one.partition("=") for one in settings.split(",") if one]
    plan = Plan.make(scheme, "gptq", {key: value for key, _, value in pairs})
    if not isinstance(plan.grid, Grid):
        raise OptionError(f"--quantize-aware {scheme}: it rounds each value by itself", "int2, int4, int8 or w8")
    wanted = {"activations": "dynamic", "granularity": "token"}
    for name, value in wanted.items():
        if getattr(plan.scheme.options, name, value) != value:
            raise OptionError(f"--quantize-aware {typed}: activations are trained with a dynamic scale per token only")
    if plan.rounding.options.sequential:
        raise OptionError(f"--quantize-aware {typed}: training starts at layers rounded apart", "leave sequential out")
    return plan


@dataclass
class _Target:
    """A weight on a grid.

    Attributes:
        name: the layer's.
        parameter: the weight.
        grid: the values it may take.
        is_transposed: its rows are input features.
        is_linear: a linear layer's, rounded as the plan says; else a head or a table, rounded to nearest.
        scales: float32 [N, blocks].
        zero_points: float32 [N, blocks].
    """

    name: str
    parameter: "torch.nn.Parameter"
    grid: Grid
    is_transposed: bool
    is_linear: bool
    scales: Any = None
    zero_points: Any = None


class FakeQuantizer:
    """Rounds the weights of a model while it computes.

    Args:
        model: its linear layers are rounded to the scheme's grid; its head and its large tables to 8-bit blocks, as
            `quantize` does.
        plan: scheme, and options of rounding.
    """

    def __init__(self, model: "torch.nn.Module", plan: Plan) -> None:
        self._plan = plan
        self._model = model
        self._targets = _find_targets(model, plan)
        if not self._targets:
            raise UnsupportedError("--quantize-aware: the model has no linear layer", "leave it out")
        self._is_active = False
        if isinstance(plan.grid, Grid) and not plan.grid.block_size:
            self._watch_activations(model)

    def start(self, see_rows: Callable[[], object]) -> None:
        """Find every weight's grid, and move linear layers to what GPTQ makes of them.

        Args:
            see_rows: lets the model compute some rows.
        """
        import torch

        statistics = self._measure(see_rows)
        for target in self._targets:
            weight = np.ascontiguousarray(_rows_of(target).cpu().numpy())
            seen = statistics.get(id(target.parameter))
            if seen is None:
                _adopt(target, rtn.quantize_weight(weight, target.grid, rtn.Options()))
                continue
            found = gptq.quantize_weight(weight, target.grid, self._plan.rounding.options, seen, target.name)
            _adopt(target, found)
            values = torch.from_numpy(found.dequantize())
            with torch.no_grad():
                target.parameter.copy_(values.T if target.is_transposed else values)

    @contextmanager
    def rounded(self, follow: bool = True) -> Iterator[None]:
        """Let the model have rounded weights while the body runs.

        Args:
            follow: scales move with the weights from now on; else for this time only.
        """
        import torch

        masters = [target.parameter.detach().clone() for target in self._targets]
        with torch.no_grad():
            for target in self._targets:
                values, scales = _round(target)
                target.parameter.copy_(values)
                if follow:
                    target.scales = scales
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False
            with torch.no_grad():
                for target, master in zip(self._targets, masters, strict=True):
                    target.parameter.copy_(master)

    def settle(self) -> None:
        """Leave the model with rounded weights."""
        import torch

        with torch.no_grad():
            for target in self._targets:
                target.parameter.copy_(_round(target)[0])

    def state(self) -> list[list[Any]]:
        """Return what a checkpoint keeps: scales and zero points."""
        return [[target.scales, target.zero_points] for target in self._targets]

    def load(self, state: list[list[Any]]) -> None:
        """Take over what a checkpoint kept."""
        for target, (scales, zero_points) in zip(self._targets, state, strict=True):
            target.scales, target.zero_points = scales, zero_points

    def _measure(self, see_rows: Callable[[], object]) -> dict[int, Statistics]:
        """Return the statistics of the inputs of linear layers, by the id of their weight."""
        import torch

        linear = {id(target.parameter) for target in self._targets if target.is_linear}
        counts: dict[int, int] = defaultdict(int)
        largest: dict[int, torch.Tensor] = {}
        sums: dict[int, torch.Tensor] = {}

        def before(module: Any, inputs: tuple[Any, ...]) -> None:
            key, tokens = id(module.weight), inputs[0].float().flatten(0, -2)
            with torch.autocast(tokens.device.type, enabled=False):
                power, found = tokens.T @ tokens, tokens.abs().amax(0)
            counts[key] += len(tokens)
            sums[key] = sums[key].add_(power) if key in sums else power
            largest[key] = largest[key].maximum(found) if key in largest else found

        hooks = [
            module.register_forward_pre_hook(before)
            for module in self._model.modules()
            if id(getattr(module, "weight", None)) in linear
        ]
        try:
            with torch.no_grad():
                see_rows()
        finally:
            for hook in hooks:
                hook.remove()
        return {
            key: Statistics(counts[key], largest[key].cpu().numpy(), (total / counts[key]).cpu().numpy())
            for key, total in sums.items()
        }

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
    names = {id(module): name for name, module in model.named_modules()}
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
                found[id(weight)] = _Target(names[id(module)], weight, blocks, False, is_linear=False)
        elif not isinstance(module, torch.nn.Embedding):
            found[id(weight)] = _Target(names[id(module)], weight, grid, isinstance(module, Conv1D), is_linear=True)
    return list(found.values())


def _rows_of(target: _Target) -> "torch.Tensor":
    """Return a weight as [N, K], a row for each output feature."""
    weight = target.parameter.detach()
    return weight.T if target.is_transposed else weight


def _adopt(target: _Target, found: QuantizedWeight) -> None:
    """Take over scales and zero points."""
    import torch

    device = target.parameter.device
    middle = np.full(found.scales.shape, target.grid.middle, np.uint8)
    zeros = middle if found.zero_points is None else found.zero_points
    target.scales = torch.from_numpy(found.scales).to(device)
    target.zero_points = torch.from_numpy(zeros).to(device, torch.float32)


def _round(target: _Target) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the weight rounded to codes under its scales, and the scales fitted to these codes, which it then has."""
    import torch
    from torch.nn.functional import pad

    weight = _rows_of(target)
    rows, columns = weight.shape
    size = target.grid.block_size or columns
    blocks = pad(weight, (0, -columns % size)).reshape(rows, -1, size)
    zeros = target.zero_points[..., None]
    steps = (blocks / target.scales[..., None]).round_().add_(zeros).clamp_(0, target.grid.largest).sub_(zeros)
    power, fitted = (steps * steps).sum(-1), (blocks * steps).sum(-1)
    is_fit = (power > 0) & (fitted > 0)
    scales = torch.where(is_fit, fitted / power.clamp(min=1), target.scales)
    scales = torch.from_numpy(storable_scales(scales.cpu().numpy(), target.grid)).to(weight.device)
    values = steps.mul_(scales[..., None]).reshape(rows, -1)[:, :columns]
    return (values.T if target.is_transposed else values), scales


def _round_rows(hidden: "torch.Tensor") -> "torch.Tensor":
    """Round every token's features to 8 bits under its own scale; the gradient goes straight through."""
    wide = hidden.detach().float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / _LARGEST_ACTIVATION
    rounded = (wide / scale).round() * scale
    return hidden + (rounded - wide).to(hidden.dtype)
