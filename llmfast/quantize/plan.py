"""What a quantization will do, checked before it begins: plug-ins with their options, layers with their grids."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import ModuleType
from typing import Any

import onnx

from llmfast import registry
from llmfast.errors import OptionError, UnsupportedError
from llmfast.graph.floats import FloatFormat
from llmfast.graph.linear import Embedding, Linear, find_embeddings, find_linears
from llmfast.graph.model import HALVES, OnnxModel
from llmfast.graph.packed import Grid, largest_block_size
from llmfast.graph.view import attribute
from llmfast.report import note

HEAD_ROLE = "lm_head"
EMBEDDING_ROLE = "embedding"
FLOAT_BITS = 32
DEFAULT_ROUNDING = "rtn"
# Without zero points, codes of so few bits want a scale for every few values.
_FEW_BITS, _SMALL_BLOCK = 4, 32

# A graph that has one of these was quantized before.
_QUANTIZED_OPS = frozenset(
    {"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"}
    | {"DequantizeLinear", "GatherBlockQuantized"}
)


@dataclass(frozen=True)
class Choice:
    """A plug-in and its resolved options."""

    name: str
    plugin: ModuleType
    options: Any


@dataclass(frozen=True)
class Plan:
    """The plug-ins of one quantization.

    Attributes:
        scheme: the number format.
        transforms: what is done to weights and activations before, in order.
        rounding: how codes and scales are found.
    """

    scheme: Choice
    transforms: tuple[Choice, ...]
    rounding: Choice

    @property
    def method(self) -> str:
        """The method as it is typed: transforms, then rounding."""
        return ",".join(choice.name for choice in (*self.transforms, self.rounding))

    @property
    def grid(self) -> Grid | FloatFormat:
        """The values that a linear layer's weight may take."""
        grid: Grid | FloatFormat = self.scheme.plugin.grid(self.scheme.options)
        return grid

    @property
    def needs_calibration(self) -> list[str]:
        """The plug-ins that ask for statistics of activations."""
        scheme = [self.scheme.name] if self.scheme.plugin.needs_statistics(self.scheme.options) else []
        return scheme + [one.name for one in (*self.transforms, self.rounding) if one.plugin.NEEDS_STATISTICS]

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The resolved options of every plug-in that has work to do."""
        rounding = () if isinstance(self.grid, FloatFormat) else (self.rounding,)
        return {choice.name: asdict(choice.options) for choice in (self.scheme, *self.transforms, *rounding)}

    @classmethod
    def make(cls, scheme: str, method: str, settings: Mapping[str, str]) -> "Plan":
        """Load the plug-ins and give each its settings.

        Args:
            scheme: a file in quantize/schemes.
            method: names of transforms and of one rounding, separated by commas; rounding defaults to rtn.
            settings: `KEY` or `PLUGIN.KEY` -> value as typed.

        Raises:
            OptionError: an unknown name, key or value, or methods in an order that can't be.
        """
        transforms, rounding = _split_method(method)
        folders = [("quantize.schemes", scheme), *(("quantize.transforms", name) for name in transforms)]
        folders.append(("quantize.rounding", rounding))
        plugins = {name: registry.load(folder, name) for folder, name in folders}
        chosen = share_out(settings, plugins)
        first, *middle, last = [
            Choice(name, plugin, registry.make_options(plugin, chosen[name])) for name, plugin in plugins.items()
        ]
        plan = cls(first, tuple(middle), last)
        _check_scheme(plan, chosen[last.name])
        return plan


@dataclass(frozen=True)
class Layers:
    """The weights of a graph that will be quantized.

    Attributes:
        linears: the layers, kept ones not among them.
        embeddings: the tables.
        grids: weight -> the values it may take; weights that stay float are missing.
        block_wise: weights in 8-bit blocks whatever the scheme: embeddings and heads.
    """

    linears: list[Linear]
    embeddings: list[Embedding]
    grids: dict[str, Grid | FloatFormat]
    block_wise: frozenset[str]

    @property
    def num_nodes(self) -> int:
        """How many nodes will be replaced."""
        weights = [linear.weight for linear in self.linears] + [table.weight for table in self.embeddings]
        return sum(weight in self.grids for weight in weights)

    def bits(self, weight: str) -> int:
        """Return how many bits a weight will have."""
        return self.grids[weight].bits if weight in self.grids else FLOAT_BITS


@dataclass(frozen=True)
class Part:
    """One graph of a bundle and what becomes of it."""

    plan: Plan
    model: OnnxModel
    layers: Layers


def list_layers(graphs: Sequence[Layers]) -> list[dict[str, Any]]:
    """Return one row per role over all graphs of a bundle: layers, parameters, bits; what they share counts once."""
    parts: dict[str, tuple[str, tuple[int, int], int]] = {}
    for layers in graphs:
        for table in layers.embeddings:
            parts.setdefault(table.weight, (EMBEDDING_ROLE, table.shape, layers.bits(table.weight)))
        for linear in layers.linears:
            role = HEAD_ROLE if linear.weight in layers.block_wise else linear.role
            parts.setdefault(linear.weight, (role, linear.shape, layers.bits(linear.weight)))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for role, (out_features, in_features), bits in parts.values():
        row = rows.setdefault((role, bits), {"role": role, "layers": 0, "num_parameters": 0, "bits": bits})
        row["layers"] += 1
        row["num_parameters"] += out_features * in_features
    return list(rows.values())


def choose_layers(model: OnnxModel, plan: Plan, include: str, exclude: str) -> Layers:
    """Find the weights to quantize and give each its grid.

    Args:
        model: a float graph.
        plan: says which grid.
        include: quantize only layers whose name or role matches this regular expression.
        exclude: keep layers whose name or role matches; empty keeps none.

    Raises:
        OptionError: not a regular expression.
        UnsupportedError: nothing to quantize, or already quantized.
    """
    refuse_quantized(model)
    try:
        wanted, unwanted = re.compile(include), re.compile(exclude or r"(?!)")
    except re.error as error:
        raise OptionError(f"not a regular expression: `{error.pattern!s}`: {error}") from error

    def chosen(name: str, role: str) -> bool:
        names = (name, role)
        return any(map(wanted.search, names)) and not any(map(unwanted.search, names))

    found = find_linears(model)
    tables = find_embeddings(model, found)
    tied = {table.weight for table in tables}
    linears = [one for one in found if chosen(one.name, HEAD_ROLE if one.weight in tied else one.role)]
    embeddings = [table for table in tables if chosen(table.weight.removesuffix(".weight"), EMBEDDING_ROLE)]
    if not linears and not embeddings:
        hint = "it has no MatMul or plain Gemm with a constant float32 matrix"
        if any(node.op_type == "If" for node in model.proto.graph.node):
            hint = "its layers are in the branches of an If, as in merged decoders: export it without merging"
        if any(tensor.data_type in HALVES for tensor in model.initializers.values()):
            hint = "its weights are in half precision: start from the float model"
        if found:
            hint = "--include/--exclude leave none of its layers"
        raise UnsupportedError(f"nothing to quantize in `{model.path}`", hint)
    layers = _assign_grids(linears, embeddings, tied, plan)
    _say_what_is_padded(layers)
    return layers


def _say_what_is_padded(layers: Layers) -> None:
    """Say which block sizes do not divide the input features: the last blocks are filled up, and take space."""
    shapes = [(layers.grids.get(linear.weight), linear.shape[1]) for linear in layers.linears]
    blocks = [(one.block_size, features) for one, features in shapes if isinstance(one, Grid) and one.block_size]
    padded = [size for size, features in blocks if features % size]
    for size in sorted(set(padded)):
        count = padded.count(size)
        note(f"note: blocks of {size} do not divide the input features of {count} layers: the last are filled up")


def refuse_quantized(model: OnnxModel) -> None:
    """Raise an UnsupportedError that says how, when a graph has quantized layers."""
    quantized = Counter(_spell(node) for node in model.proto.graph.node if node.op_type in _QUANTIZED_OPS)
    if quantized:
        parts = ", ".join(f"{count} {kind}" for kind, count in quantized.most_common())
        raise UnsupportedError(f"`{model.path}` is already quantized: it has {parts}", "start from the float model")


def _spell(node: onnx.NodeProto) -> str:
    bits, block_size = (attribute(node, name, 0) for name in ("bits", "block_size"))
    return f"{node.op_type} of {bits} bits in blocks of {block_size}" if bits and block_size else str(node.op_type)


def _assign_grids(linears: list[Linear], embeddings: list[Embedding], tied: set[str], plan: Plan) -> Layers:
    grids = dict.fromkeys([linear.weight for linear in linears], plan.grid)
    if isinstance(plan.grid, FloatFormat):  # of which tables and heads need no other one
        return Layers(linears, embeddings, grids | {table.weight: plan.grid for table in embeddings}, frozenset())
    tables = {table.weight: table.shape[1] for table in embeddings}
    heads = {one.weight: one.shape[1] for one in linears if one.role == HEAD_ROLE or one.weight in tied}
    bits = plan.scheme.options.head_bits
    for weight, features in (tables | heads).items():
        if bits == FLOAT_BITS:
            grids.pop(weight, None)
        else:
            grids[weight] = block_wise_grid(features, bits)
    return Layers(linears, embeddings, grids, frozenset(tables | heads))


def block_wise_grid(in_features: int, bits: int) -> Grid:
    """Return the grid of an embedding or head: the largest blocks that fit, at 4 bits small ones; no zero points."""
    size = largest_block_size(in_features)
    return Grid(bits=bits, block_size=min(size, _SMALL_BLOCK) if bits == _FEW_BITS else size)


def _split_method(method: str) -> tuple[list[str], str]:
    transforms, roundings = registry.names("quantize.transforms"), registry.names("quantize.rounding")
    names = [name.strip() for name in method.split(",")] if method else []
    for name in names:
        if name not in transforms + roundings:
            raise registry.unknown_name("method", name, transforms + roundings)
    if any(name in roundings for name in names[:-1]) or len(set(names)) < len(names):
        raise OptionError(f"--method `{method}`: not transforms first, then one rounding", "e.g. smoothquant,gptq")
    if names and names[-1] in roundings:
        return names[:-1], names[-1]
    return names, DEFAULT_ROUNDING


def share_out(settings: Mapping[str, str], plugins: Mapping[str, ModuleType]) -> dict[str, dict[str, str]]:
    """Give each setting to the plug-in that has it."""
    keys = {name: {entry.name for entry in fields(plugin.Options)} for name, plugin in plugins.items()}
    chosen: dict[str, dict[str, str]] = {name: {} for name in plugins}
    for typed, value in settings.items():
        owner, _, key = typed.replace("-", "_").rpartition(".")
        owners = [name for name in plugins if key in keys[name] and owner in ("", name)]
        if not owners:
            near = registry.unknown_name("option", key, sorted(set().union(*keys.values())))
            raise OptionError(f"{', '.join(plugins)}: no option `{typed}`", near.hint)
        if len(owners) > 1:
            raise OptionError(f"several methods have an option `{key}`", f"say {' or '.join(owners)} with a dot")
        chosen[owners[0]][key] = value
    return chosen


def _check_scheme(plan: Plan, rounding_settings: Mapping[str, str]) -> None:
    """Refuse options of a scheme that can't be, and methods that have nothing to do."""
    if isinstance(plan.grid, FloatFormat):
        idle = [one.name for one in plan.transforms]
        if plan.rounding.name != DEFAULT_ROUNDING or rounding_settings:
            idle.append(", ".join([plan.rounding.name, *rounding_settings]))
        if idle:
            raise OptionError(
                f"`{', '.join(idle)}` has nothing to do: {plan.scheme.name} rounds each value by itself to nearest",
                "leave out --method and its options",
            )
        return
    head_bits = plan.scheme.options.head_bits
    if head_bits not in (4, 8, FLOAT_BITS):
        raise OptionError(f"head_bits {head_bits}: not 4, 8 or {FLOAT_BITS}")
