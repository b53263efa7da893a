"""The attempts that a budget takes: layers are chosen, written and judged until it is met."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmfast.bundle import ModelBundle
from llmfast.errors import GateError, UnsupportedError
from llmfast.graph.floats import FloatFormat
from llmfast.graph.model import OnnxModel, count_weight_bytes
from llmfast.graph.packed import Grid
from llmfast.graph.weights import ALIGNMENT, SINGLE_FILE_BYTES
from llmfast.quantize import sensitivity
from llmfast.quantize.budget import Budget, GridChoice, file_bytes, num_parameters
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.checkpoint import Checkpoint
from llmfast.quantize.comparison import damage_of
from llmfast.quantize.measure import SEQ_LEN, ProofText, hold_out, problem_type_of
from llmfast.quantize.pairs import Values, feed_pairs, is_encoder_decoder, make_reader, takes_recordings
from llmfast.quantize.plan import Layers, Part
from llmfast.quantize.rewrite import RoundWeight
from llmfast.quantize.sensitivity import targets_of
from llmfast.report import note, progress

# Samples that the damage of each layer is measured on.
_DAMAGE_SAMPLES = 2
_DAMAGE_PAIRS = 8  # of sentences, which are short
_NUM_PRINTED = 5
# What storing a weight takes beside it: nodes and names, and in a file of its own half a page for each of its parts.
_NODE_BYTES = 1000
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
        assert self._written is not None
        is_kept = damage <= limit
        if is_kept:
            if self._max_damage == self._passed:
                return True  # this was the best attempt, written once more
            self._passed = self._max_damage
            if damage >= _CLOSE_ENOUGH * limit:
                return True
        else:
            self._failed = min(self._failed, self._max_damage)
        self._tried.append((damage, self._written))
        following = max(self._expected, 1e-9) * limit / max(damage, 1e-9) * 0.95
        if following >= self._failed:
            following = (self._failed + (self._passed or 0.0)) / 2
        if self._attempts >= _MOST_ATTEMPTS or self._is_tried(following):
            if self._passed is None:
                raise GateError(
                    f"budget missed: {name} {damage:.4g} at {num_bytes / 1e6:.1f} MB is the best that can be, "
                    f"asked at most {limit:g}",
                    "raise --max-kld, try --method gptq, or leave layers as floats with --exclude",
                )
            following = self._passed
        self._max_damage = following
        return is_kept and following == self._passed

    def _is_tried(self, max_damage: float) -> bool:
        """Return whether a damage limit gives grids that were written before."""
        layers, _ = self._choice.under(self._max_bytes, max_damage)
        return layers is not None and any(_grids_of(layers) == _grids_of(tried) for _, tried in self._tried)


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
        sensitivity.copy(known, folder)
    else:
        samples = _probe_samples(bundle, models, calibration)
        with progress("measuring what each layer costs", len(targets_of(parts))) as advance:
            problem_type = problem_type_of(bundle)
            damages = sensitivity.measure_damages(parts, samples, roundings, checkpoint, problem_type, advance)
        facts = {"method": method, "calibration": calibration.describe()}
        sensitivity.save(folder / sensitivity.FILE, damages, facts)
    costliest = sorted(damages, key=lambda one: -one.damage)[:_NUM_PRINTED]
    note(
        f"what layers cost when they alone are rounded to {sensitivity.PROBE.bits} bits (all are in "
        f"{sensitivity.FILE}): {', '.join(f'{one.name} {one.damage:.4f}' for one in costliest)}, ..."
    )
    choice = GridChoice(parts, damages, plan.scheme.plugin.grid(plan.scheme.options).symmetric)
    overhead = 0
    if budget.max_bytes is not None:
        lies_outside = len(models) > 1 or budget.max_bytes > SINGLE_FILE_BYTES
        padding = ALIGNMENT if lies_outside else 0
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
