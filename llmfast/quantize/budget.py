"""Mixed precision: each layer's bits and block size under a budget of size or of damage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmfast.bundle import ModelBundle
from llmfast.errors import GateError, OptionError, UnsupportedError
from llmfast.graph.floats import FloatFormat
from llmfast.graph.model import OnnxModel, count_parameters, count_weight_bytes, tensor_bytes
from llmfast.graph.packed import Grid
from llmfast.graph.weights import ALIGNMENT, SINGLE_FILE_BYTES
from llmfast.quantize import sensitivity
from llmfast.quantize.allocate import Option, allocate
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.checkpoint import Checkpoint
from llmfast.quantize.comparison import damage_of
from llmfast.quantize.measure import SEQ_LEN, ProofText, hold_out
from llmfast.quantize.pairs import Values, feed_pairs, is_encoder_decoder, make_reader, takes_recordings
from llmfast.quantize.plan import Layers, Part
from llmfast.quantize.rewrite import RoundWeight
from llmfast.quantize.sensitivity import LayerDamage, grid_errors, targets_of
from llmfast.report import note, progress

# The widths and block sizes that layers may get; all have fast kernels.
_BITS = (4, 8)
_BLOCK_SIZES = (32, 64, 128)
# Samples that the damage of each layer is measured on.
_DAMAGE_SAMPLES = 2
_DAMAGE_PAIRS = 8  # of sentences, which are short
_NUM_PRINTED = 5
# What storing a weight takes beside it: nodes and names, and in a file of its own half a page for each of its parts.
_NODE_BYTES = 1000
_PADDING = ALIGNMENT


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


# A measured damage this close below the limit is not worth another attempt.
_CLOSE_ENOUGH = 0.85
_MOST_ATTEMPTS = 5


class Fitting:
    """The attempts to meet a budget: what is expected, corrected by what the written model really does.

    Under a size, blocks of one kind everywhere are tried too: damages of single layers add up only roughly, and the
    choice by layer must not be worse than the one that needs no measuring.

    Args:
        choice: gives layers for limits.
        budget: what is asked.
        parameters: of the model.
        overhead: what the budget's `size` is expected to hold beside the weights.
    """

    def __init__(self, choice: GridChoice, budget: Budget, parameters: int, overhead: int) -> None:
        self._choice = choice
        self._budget = budget
        self._parameters = parameters
        self._limit = budget.limit(parameters)
        self._max_bytes = self._limit - overhead
        self._max_damage = budget.max_kld or 0.0
        self._attempts = 0
        self._expected = 0.0
        self._written: dict[str, Layers] | None = None
        self._rival: dict[str, Layers] | None = None  # what is written next, in place of a choice by layer
        self._tried: list[tuple[float, dict[str, Layers]]] = []
        self._passed: float | None = None  # the largest damage limit whose model kept the budget
        self._failed = float("inf")  # the smallest whose model did not

    def layers(self) -> dict[str, Layers]:
        """Return the layers of each graph to write next.

        Raises:
            GateError: no grids meet the budget.
        """
        if self._rival is not None:
            self._written, self._rival = self._rival, None
            return self._written
        self._attempts += 1
        layers, self._expected = self._choice.under(self._max_bytes, self._max_damage)
        if layers is None:
            smallest = self._choice.smallest_bytes + self._limit - self._max_bytes
            needed, asked = (self._budget.spell(size, self._parameters) for size in (smallest, self._limit))
            raise GateError(
                f"budget missed: at least {needed} are needed, asked at most {asked}",
                "raise the target, or leave out more with --trim-vocabulary",
            )
        self._written = layers
        return layers

    def is_met(self, written: Sequence[OnnxModel], figures: Mapping[str, float]) -> bool:
        """Judge what was written; False asks for another attempt.

        Args:
            written: the quantized graphs.
            figures: of its answers, none when they were not compared.

        Raises:
            GateError: the budget can't be met.
        """
        num_bytes = self._budget.size(written)
        if self._budget.max_kld is None:
            excess = num_bytes - self._limit
            if excess > 0 and not self._tried:
                self._max_bytes -= excess  # padding, or scales that float16 can't hold
                return False
            return not figures or self._is_best(damage_of(figures)[1] if excess <= 0 else float("inf"))
        return self._is_close(*damage_of(figures), self._budget.max_kld, num_bytes)

    def _is_best(self, damage: float) -> bool:
        """Take note of what was written, and return whether nothing better is known; otherwise that comes next."""
        assert self._written is not None
        if len(self._tried) == 2:
            return True  # the better of the two, written once more
        self._tried.append((damage, self._written))
        if len(self._tried) == 1:
            self._rival = self._choice.uniform_under(self._max_bytes)
            return self._rival is None or _grids_of(self._rival) == _grids_of(self._written)
        (by_layer, layers), (uniform, _) = self._tried
        note(f"the choice by layer costs {by_layer:.4f}, the same blocks everywhere {uniform:.4f}")
        if uniform < by_layer:
            return True
        self._rival = layers
        return False

    def _is_close(self, name: str, damage: float, limit: float, num_bytes: int) -> bool:
        tried = self._max_damage
        if damage <= limit:
            if tried == self._passed:
                return True  # this was the best attempt, written once more
            self._passed = tried
            if damage >= _CLOSE_ENOUGH * limit or self._attempts >= _MOST_ATTEMPTS:
                return True
        else:
            self._failed = min(self._failed, tried)
            if self._passed is None and (self._expected > tried or self._attempts >= _MOST_ATTEMPTS):
                raise GateError(
                    f"budget missed: {name} {damage:.4g} at {num_bytes / 1e6:.1f} MB is the best that can be, "
                    f"asked at most {limit:g}",
                    "raise --max-kld, try --method gptq, or leave layers as floats with --exclude",
                )
        if self._passed is not None and self._attempts >= _MOST_ATTEMPTS:
            self._max_damage = self._passed
            return False
        following = max(self._expected, 1e-9) * limit / max(damage, 1e-9) * 0.95
        if following >= self._failed:
            following = (self._failed + (self._passed or 0.0)) / 2
        self._max_damage = following
        return False


def _grids_of(layers: Mapping[str, Layers]) -> list[Mapping[str, Grid | FloatFormat]]:
    return [one.grids for one in layers.values()]


def start_fitting(
    budget: Budget,
    calibration: Calibration,
    known: Path | None,
    bundle: ModelBundle,
    parts: Mapping[str, Part],
    roundings: Mapping[str, RoundWeight],
    checkpoint: Checkpoint,
    folder: Path,
) -> Fitting:
    """Measure what each layer costs, leave that in a file, and return what chooses the grids.

    Args:
        budget: what is asked.
        calibration: the text to measure on.
        known: what an earlier run measured, in place of measuring.
        bundle: the float bundle.
        parts: its graphs by role, with one plan, and the layers that will be quantized.
        roundings: role -> the method's, without transforms.
        checkpoint: holds damages that an interrupted run measured.
        folder: where the file goes.

    Raises:
        InputError: too little text, or nothing to read it with.
        UnsupportedError: the graph runs on no inputs that can be made for it.
    """
    plan, *_ = (part.plan for part in parts.values())
    models = {role: part.model for role, part in parts.items()}
    method = plan.rounding.name
    if known is not None:
        damages = sensitivity.load(known, targets_of(parts), method)
    else:
        samples = _probe_samples(bundle, models, calibration)
        with progress("measuring what each layer costs", len(targets_of(parts))) as advance:
            damages = sensitivity.measure_damages(parts, samples, roundings, checkpoint, advance)
    costliest = sorted(damages, key=lambda one: -one.damage)[:_NUM_PRINTED]
    note(
        f"what layers cost when they alone are rounded to {sensitivity.PROBE.bits} bits (all are in "
        f"{sensitivity.FILE}): {', '.join(f'{one.name} {one.damage:.4f}' for one in costliest)}, ..."
    )
    sensitivity.save(folder / sensitivity.FILE, damages, {"method": method, "calibration": calibration.describe()})
    choice = GridChoice(parts, damages, plan.scheme.plugin.grid(plan.scheme.options).symmetric)
    overhead = 0
    if budget.max_bytes is not None:
        lies_outside = len(models) > 1 or budget.max_bytes > SINGLE_FILE_BYTES
        padding = _PADDING if lies_outside else 0
        now = list(models.values())
        overhead = file_bytes(now) - count_weight_bytes(now) + (_NODE_BYTES + padding) * len(damages)
    return Fitting(choice, budget, num_parameters(bundle, list(models.values())), overhead)


def _probe_samples(
    bundle: ModelBundle, models: Mapping[str, OnnxModel], calibration: Calibration
) -> dict[str, list[Values]]:
    """Return what damages are measured on: role -> the inputs of each sample."""
    if is_encoder_decoder(models):
        count = _DAMAGE_SAMPLES if takes_recordings(models) else _DAMAGE_PAIRS
        reader = make_reader(bundle, models)
        _, chosen = ProofText(calibration.corpus, calibration, False, count).choose(reader.read)
        return feed_pairs(models, reader.complete(chosen, SEQ_LEN, "measure layers"))
    ((role, model),) = models.items()
    samples = hold_out(bundle, model, ProofText(calibration.corpus, calibration, False, _DAMAGE_SAMPLES)).samples
    if not samples:
        raise UnsupportedError(f"a budget can't be measured on `{model.path}`", "choose a --scheme")
    return {role: [*samples]}


def file_bytes(models: Sequence[OnnxModel]) -> int:
    """Return the bytes on disk of graphs and the files their weights lie in."""
    files = {file for model in models for file in model.state()}
    return sum(file.stat().st_size for file in files)


def num_parameters(bundle: ModelBundle, models: Sequence[OnnxModel]) -> int:
    """Return the number of trained values."""
    return int(bundle.manifest.architecture.get("num_parameters") or count_parameters(models))
