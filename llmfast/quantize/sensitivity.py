"""What each layer costs when its weight is rounded: the float model run with one rounded weight after the other.

Weights become inputs with a default value, so that one session serves all layers and nothing is reopened. The
method that will round the weights rounds them here too: what it gains differs much from layer to layer. The
damage of a weight on another grid than the probe's grows with its squared error: KL divergence is quadratic in
small errors, so damage(grid) = damage(probe) * error(grid) / error(probe), and the damages of layers add up.
Where a model has several graphs, an encoder and a decoder, the answers are the last one's: a weight of the encoder is
judged by what the decoder makes of it. Cost: one pass over the samples per layer, from the graph that it is in on.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.bundle import read_json
from llmfast.divergence import kl_divergence, log_softmax
from llmfast.errors import InputError
from llmfast.graph.feeds import CROSS
from llmfast.graph.linear import Embedding, Linear
from llmfast.graph.packed import Grid
from llmfast.quantize.checkpoint import Checkpoint
from llmfast.quantize.comparison import Comparison, choices_of, damage_of
from llmfast.quantize.plan import EMBEDDING_ROLE, HEAD_ROLE, Part
from llmfast.quantize.rewrite import RoundWeight
from llmfast.quantize.rounding import rtn
from llmfast.report import note
from llmfast.runtime import open_session

FILE = "sensitivity.json"
# What every layer is rounded to when its damage is measured: large enough an error to stand out of float32's noise.
PROBE = Grid(bits=4, block_size=32, symmetric=False)
_FORMAT = 1
_ROWS = 256  # of a weight, from which the errors of its grids are estimated
_OPTIONS = rtn.Options(search_steps=6)

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class LayerDamage:
    """What rounding one weight to the probe's grid does to the answers.

    Attributes:
        weight: the initializer.
        name: the layer's.
        role: what layers of one kind share.
        shape: (N, K).
        damage: KL divergence in nats, or 1 - cosine, or the squared relative error, as the graph's outputs allow.
    """

    weight: str
    name: str
    role: str
    shape: tuple[int, int]
    damage: float


@dataclass(frozen=True)
class Target:
    """A weight that will be rounded; graphs that share it have it under one name.

    Attributes:
        graph: the role of the first graph that has it, of those that multiply by it if there are any.
        name: the layer's.
        role: what layers of one kind share.
        layer: what reads it there.
        in_blocks: a table or a head, rounded to nearest whatever the method, and without zero points.
    """

    graph: str
    name: str
    role: str
    layer: Linear | Embedding
    in_blocks: bool

    @property
    def linear(self) -> Linear | None:
        """What a method rounds it for."""
        return self.layer if isinstance(self.layer, Linear) and not self.in_blocks else None


def targets_of(parts: Mapping[str, Part]) -> dict[str, Target]:
    """Return weight -> what it is, over all graphs of a model; those that stay float are left out."""
    found: dict[str, Target] = {}
    for graph, part in parts.items():
        for linear in part.layers.linears:
            in_blocks = linear.weight in part.layers.block_wise
            if linear.weight in part.layers.grids:
                role = HEAD_ROLE if in_blocks else linear.role
                found.setdefault(linear.weight, Target(graph, linear.name, role, linear, in_blocks))
    for graph, part in parts.items():
        for table in part.layers.embeddings:
            if table.weight in part.layers.grids:
                name = table.weight.removesuffix(".weight")
                found.setdefault(table.weight, Target(graph, name, EMBEDDING_ROLE, table, in_blocks=True))
    return found


@dataclass(frozen=True)
class _OpenGraph:
    """A graph that is open.

    Attributes:
        session: takes the weights as inputs too.
        weights: those that may be exchanged.
        samples: the inputs of each sample.
        outputs: what the next graph reads; of the last, what is compared.
    """

    session: Any
    weights: frozenset[str]
    samples: Sequence[Values]
    outputs: list[str]

    def run(self, values: Values) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self.session.run(self.outputs, dict(values))
        return outputs


class WeightProbe:
    """A float model whose weights can be exchanged from run to run.

    Args:
        parts: its graphs by role, each before the one that reads what it makes.
        samples: role -> the inputs of each sample, those that an earlier graph makes as the float model makes them.
        problem_type: what kind of classifier it is, as of `choices_of`.
    """

    def __init__(
        self, parts: Mapping[str, Part], samples: Mapping[str, Sequence[Values]], problem_type: str = ""
    ) -> None:
        self._problem_type = problem_type
        self._graphs = [_open(part, samples[role]) for role, part in parts.items()]
        self._last = self._graphs[-1]
        self._all_outputs = [output.name for output in self._last.session.get_outputs()]
        # Logits that choose are kept as log probabilities, so that the reference's are computed once.
        self._chooses = self._choices(self._last.run(self._last.samples[0])) is not None
        self._references = [self._digest(self._last.run(values)) for values in self._last.samples]

    def damage(self, weight: str, values: np.ndarray) -> float:
        """Return how far the answers move with another value of a weight, float32 of its stored shape."""
        answers = (self._answers(number, weight, values) for number in range(len(self._references)))
        if self._chooses:
            moved = [
                kl_divergence(self._digest(ours)[0], reference[0]).mean()
                for ours, reference in zip(answers, self._references, strict=True)
            ]
            return float(max(np.mean(moved), 0.0))
        comparison = Comparison(self._all_outputs, predicts_tokens=False, problem_type=self._problem_type)
        for sample, ours, reference in zip(self._last.samples, answers, self._references, strict=True):
            comparison.add(dict(sample), ours, reference)
        return damage_of(comparison.figures())[1]

    def _answers(self, number: int, weight: str, array: np.ndarray) -> list[np.ndarray]:
        """Run the graphs that the weight moves, the last one always; what comes before makes what it always makes."""
        moved: dict[str, np.ndarray] = {}
        for graph in self._graphs:
            exchanged = {weight: array} if weight in graph.weights else {}
            if moved or exchanged or graph is self._last:
                outputs = graph.run({**graph.samples[number], **moved, **exchanged})
                moved = dict(zip(graph.outputs, outputs, strict=True))
        return outputs

    def _digest(self, outputs: list[np.ndarray]) -> list[np.ndarray]:
        choices = self._choices(outputs)
        return outputs if choices is None else [log_softmax(choices, np.float32)]

    def _choices(self, outputs: list[np.ndarray]) -> np.ndarray | None:
        return choices_of(outputs[0], self._problem_type) if self._last.outputs == ["logits"] else None


def _open(part: Part, samples: Sequence[Values]) -> _OpenGraph:
    model, weights = part.model, frozenset(part.layers.grids)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    known = {value.name for value in proto.graph.input}
    proto.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(model.initializers[name].dims))
        for name in part.layers.grids
        if name not in known
    )
    session = open_session(model.path, graph=proto.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    read_next = [name for name in names if name.startswith(CROSS)]
    outputs = read_next or Comparison(names, predicts_tokens=False).outputs
    return _OpenGraph(session, weights, samples, outputs)


def measure_damages(
    parts: Mapping[str, Part],
    samples: Mapping[str, Sequence[Values]],
    roundings: Mapping[str, RoundWeight],
    checkpoint: Checkpoint,
    problem_type: str,
    advance: Callable[[], None],
) -> list[LayerDamage]:
    """Round one weight after the other, and measure what it does to the answers.

    Args:
        parts: the graphs of the float model by role, and the layers that will be quantized.
        samples: the inputs to measure on, as of `WeightProbe`.
        roundings: role -> the method's, for weights and activations as they are in the float graph.
        checkpoint: holds the damages that are known, and gets those that become known.
        problem_type: as of `WeightProbe`.
        advance: called once per weight.
    """
    probe = WeightProbe(parts, samples, problem_type)
    damages = []
    for weight, target in targets_of(parts).items():
        damage = checkpoint.record(weight)
        if damage is None:
            grid = replace(PROBE, symmetric=PROBE.symmetric or target.in_blocks)
            matrix = np.asarray(target.layer.read(parts[target.graph].model), np.float32)
            rounded = roundings[target.graph](matrix, grid, target.linear).dequantize()
            damage = probe.damage(weight, np.ascontiguousarray(target.layer.as_stored(rounded)))
            checkpoint.keep_record(weight, damage)
        damages.append(LayerDamage(weight, target.name, target.role, target.layer.shape, damage))
        advance()
    return damages


def grid_errors(matrix: np.ndarray, grids: Sequence[Grid]) -> dict[Grid, float]:
    """Return the squared error of a weight [N, K] on each grid relative to the probe's, from a part of its rows."""
    rows = np.asarray(matrix[:: max(1, len(matrix) // _ROWS)], np.float32)

    def error(grid: Grid) -> float:
        rounded = rtn.quantize_weight(rows, grid, _OPTIONS).dequantize()
        return float(np.square(rounded - rows, dtype=np.float64).sum())

    on_probe = max(error(PROBE), 1e-30)
    return {grid: error(grid) / on_probe for grid in grids}


def save(path: Path, damages: Sequence[LayerDamage], facts: dict[str, Any]) -> None:
    """Write damages with what they were measured on, for `load`."""
    ranked = sorted(damages, key=lambda one: -one.damage)
    document = {"format": _FORMAT, **facts, "layers": [asdict(one) for one in ranked]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def copy(path: Path, folder: Path) -> None:
    """Take a ranking over as it is: it says how it was measured."""
    shutil.copyfile(file_of(path), folder / FILE)


def file_of(path: Path) -> Path:
    """Return the file itself, also when its bundle is given."""
    return path / FILE if path.is_dir() else path


def load(path: Path, targets: Mapping[str, Target], method: str) -> list[LayerDamage]:
    """Read the damages of all layers from a file.

    Args:
        path: a file that `save` wrote, or a bundle that holds one.
        targets: the weights that will be rounded.
        method: the rounding that will be used; a note says so when it is not the one that was measured with.

    Raises:
        InputError: unreadable, malformed, or of another model.
    """
    path = file_of(path)
    document = read_json(path)
    try:
        if document["format"] != _FORMAT:
            raise InputError(f"`{path}` has format {document['format']}, this llmfast reads {_FORMAT}")
        rows = [LayerDamage(**{**row, "shape": tuple(row["shape"])}) for row in document["layers"]]
        known = {row.weight: row for row in rows if float(row.damage) >= 0}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"malformed sensitivity: `{path}`: {error}", "it is written by quantize --target-bits"
        ) from error
    measured_with = document.get("method", method)
    if measured_with != method:
        note(
            f"note: `{path}` was measured with {measured_with}: what {method} gains differs from layer to layer; "
            "the choice is better without --sensitivity"
        )
    for weight, target in targets.items():
        shape = target.layer.shape
        if weight not in known or known[weight].shape != shape:
            raise InputError(
                f"`{path}` is of another model: it has no layer `{target.name}` of shape {shape}",
                "measure anew without it",
            )
    return [known[weight] for weight in targets]
