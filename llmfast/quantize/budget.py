"""Mixed precision: each layer's bits and block size under a budget of size or of damage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError
from llmfast.graph.floats import FloatFormat
from llmfast.graph.model import OnnxModel, count_parameters, count_weight_bytes, tensor_bytes
from llmfast.graph.packed import Grid
from llmfast.quantize.allocate import Option, allocate
from llmfast.quantize.plan import Layers, Part
from llmfast.quantize.sensitivity import LayerDamage, grid_errors, targets_of

# The widths and block sizes that layers may get; all have fast kernels.
_BITS = (4, 8)
_BLOCK_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Budget:
    """What a model may take; exactly one of the three.

    Attributes:
        max_bits: stored bits per parameter, scales included.
        max_bytes: bytes of the graphs and their weights on disk.
        max_kld: KL divergence in nats; for encoders 1 - cosine, for other graphs the squared relative error.

    Raises:
        OptionError: none or several, or one that is not positive.
    """

    max_bits: float | None = None
    max_bytes: float | None = None
    max_kld: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise OptionError("a budget is one of --target-bits, --target-size and --max-kld", "give exactly one")
        for name, value in given.items():
            if not 0 < value < float("inf"):
                raise OptionError(f"{name} {value:g}: not a positive number")

    def limit(self, parameters: int) -> float:
        """Return the most that `size` may be."""
        if self.max_bits is not None:
            return self.max_bits * parameters / 8
        return float("inf") if self.max_bytes is None else self.max_bytes

    def spell(self, num_bytes: float, parameters: int) -> str:
        """Return a size as the budget was asked for."""
        if self.max_bits is not None:
            return f"{8 * num_bytes / parameters:.4g} bits per weight"
        return f"{num_bytes / 1e6:.4g} MB"

    def size(self, models: Sequence[OnnxModel]) -> int:
        """Return the size that the budget is about: bytes on disk, for bits per weight the weights' alone."""
        return count_weight_bytes(models) if self.max_bytes is None else file_bytes(models)


class GridChoice:
    """Chooses grids for the layers of a model; what several graphs have gets one grid, and counts once.

    Args:
        parts: the float graphs by role, and the layers that will be quantized.
        damages: what each costs.
        symmetric: leave out the zero points of 4-bit blocks.
    """

    def __init__(self, parts: Mapping[str, Part], damages: Sequence[LayerDamage], symmetric: bool) -> None:
        self._layers = {role: part.layers for role, part in parts.items()}
        self._symmetric = symmetric
        self._targets = targets_of(parts)
        models = {role: part.model for role, part in parts.items()}
        # What one graph replaces another one may keep: a table too small for an encoder is the decoder's head.
        kept = {name for part in parts.values() for name in part.model.initializers if name not in part.layers.grids}
        self.fixed_bytes = count_weight_bytes(models.values()) - sum(
            tensor_bytes(models[target.graph].initializers[weight])
            for weight, target in self._targets.items()
            if weight not in kept
        )
        self._options: dict[str, list[Option]] = {}
        for one in damages:
            target = self._targets[one.weight]
            # A table is looked up without zero points.
            grids = _grids(symmetric or target.in_blocks)
            errors = grid_errors(target.layer.read(models[target.graph]), grids)
            self._options[one.weight] = [
                Option(grid, block_bytes(one.shape, grid), one.damage * errors[grid]) for grid in grids
            ]

    def under(self, max_bytes: float, max_damage: float) -> tuple[dict[str, Layers] | None, float]:
        """Return each graph's layers with the grids that meet a limit, and the damage that is expected.

        Args:
            max_bytes: of all weights, those that stay float included.
            max_damage: stops at this damage.

        Returns:
            None for the layers when the smallest grids are larger.
        """
        chosen = allocate(list(self._options.values()), max_bytes - self.fixed_bytes, max_damage)
        if chosen is None:
            return None, 0.0
        grids = {weight: one.choice for weight, one in zip(self._options, chosen, strict=True)}
        return self._with_grids(grids), sum(one.damage for one in chosen)

    def uniform_under(self, max_bytes: float) -> dict[str, Layers] | None:
        """Return the layers on one grid, tables and heads on the scheme's: the finest that fits, None if none."""
        of_scheme = {name: grid for layers in self._layers.values() for name, grid in layers.grids.items()}
        for grid in _grids(self._symmetric)[::-1]:
            grids = {name: of_scheme[name] if target.in_blocks else grid for name, target in self._targets.items()}
            shapes = {name: target.layer.shape for name, target in self._targets.items()}
            size = sum(block_bytes(shapes[name], one) for name, one in grids.items() if isinstance(one, Grid))
            if self.fixed_bytes + size <= max_bytes:
                return self._with_grids(grids)
        return None

    def _with_grids(self, grids: Mapping[str, Grid | FloatFormat]) -> dict[str, Layers]:
        return {
            role: replace(layers, grids={name: grids.get(name, grid) for name, grid in layers.grids.items()})
            for role, layers in self._layers.items()
        }

    @property
    def smallest_bytes(self) -> int:
        """The least that all weights can take."""
        return self.fixed_bytes + sum(min(one.num_bytes for one in options) for options in self._options.values())


def block_bytes(shape: tuple[int, int], grid: Grid) -> int:
    """Return the bytes of a weight (N, K) on a grid: codes, float16 scales and zero points."""
    rows, features = shape
    blocks = -(-features // grid.block_size)
    codes = rows * blocks * grid.block_size * grid.bits // 8
    zero_points = 0 if grid.symmetric else rows * -(-blocks * grid.bits // 8)
    return codes + rows * blocks * 2 + zero_points


def _grids(symmetric: bool) -> list[Grid]:
    """Return the grids to choose from, by rising size."""
    return [
        Grid(bits, block_size, symmetric or bits == 8)  # eight bits need no zero point
        for bits in _BITS
        for block_size in _BLOCK_SIZES[::-1]
    ]


def file_bytes(models: Sequence[OnnxModel]) -> int:
    """Return the bytes on disk of graphs and the files their weights lie in."""
    files = {file for model in models for file in model.state()}
    return sum(file.stat().st_size for file in files)


def num_parameters(bundle: ModelBundle, models: Sequence[OnnxModel]) -> int:
    """Return the number of trained values."""
    return int(bundle.manifest.architecture.get("num_parameters") or count_parameters(models))
