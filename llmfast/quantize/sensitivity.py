"""What each layer costs when its weight is rounded: the float graph run with one rounded weight after the other.

Weights become inputs with a default value, so that one session serves all layers and nothing is reopened. The
method that will round the weights rounds them here too: what it gains differs much from layer to layer. The
damage of a weight on another grid than the probe's grows with its squared error: KL divergence is quadratic in
small errors, so damage(grid) = damage(probe) * error(grid) / error(probe), and the damages of layers add up.
Cost: one pass over the samples per layer.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.bundle import read_json
from llmfast.divergence import kl_divergence, log_softmax
from llmfast.errors import InputError
from llmfast.graph.linear import Linear
from llmfast.graph.model import OnnxModel
from llmfast.graph.packed import Grid
from llmfast.quantize.checkpoint import Checkpoint
from llmfast.quantize.comparison import Comparison, Values, damage_of
from llmfast.quantize.plan import EMBEDDING_ROLE, HEAD_ROLE, Layers
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


class WeightProbe:
    """A float graph whose weights can be exchanged from run to run.

    Args:
        model: the graph.
        weights: the initializers.
        samples: the inputs of each sample.
        predicts_tokens: its logits are those of the next tokens.
    """

    def __init__(
        self, model: OnnxModel, weights: Sequence[str], samples: Sequence[Values], predicts_tokens: bool
    ) -> None:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        known = {value.name for value in proto.graph.input}
        proto.graph.input.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(model.initializers[name].dims))
            for name in dict.fromkeys(weights)
            if name not in known
        )
        self._session = open_session(model.path, graph=proto.SerializeToString())
        self._samples = samples
        self._predicts_tokens = predicts_tokens
        outputs = [output.name for output in self._session.get_outputs()]
        self._outputs = Comparison(outputs, predicts_tokens).outputs
        self._all_outputs = outputs
        self._references = [self._digest(self._session.run(self._outputs, one)) for one in samples]

    def damage(self, weight: str, values: np.ndarray) -> float:
        """Return how far the answers move with another value of a weight, float32 of its stored shape."""
        if self._outputs == ["logits"]:
            moved = [
                kl_divergence(self._digest(self._run(one, weight, values))[0], reference[0]).mean()
                for one, reference in zip(self._samples, self._references, strict=True)
            ]
            return float(max(np.mean(moved), 0.0))
        comparison = Comparison(self._all_outputs, self._predicts_tokens)
        for one, reference in zip(self._samples, self._references, strict=True):
            comparison.add(one, self._run(one, weight, values), reference)
        return damage_of(comparison.figures())[1]

    def _run(self, values: Values, weight: str, array: np.ndarray) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self._session.run(self._outputs, {**values, weight: array})
        return outputs

    def _digest(self, outputs: list[np.ndarray]) -> list[np.ndarray]:
        """Keep log probabilities in place of logits, so that the reference's are computed once."""
        return [log_softmax(outputs[0], np.float32)] if self._outputs == ["logits"] else outputs


def measure_damages(
    model: OnnxModel,
    layers: Layers,
    samples: Sequence[Values],
    predicts_tokens: bool,
    round_weight: RoundWeight,
    checkpoint: Checkpoint,
    advance: Callable[[], None],
) -> list[LayerDamage]:
    """Round one weight after the other, and measure what it does to the answers.

    Args:
        model: the float graph.
        layers: those that will be quantized.
        samples: the inputs to measure on.
        predicts_tokens: its logits are those of the next tokens.
        round_weight: the method's, for weights and activations as they are in the float graph.
        checkpoint: holds the damages that are known, and gets those that become known.
        advance: called once per weight.
    """
    parts = weights_of(layers)
    probe = WeightProbe(model, list(parts), samples, predicts_tokens)
    damages = []
    for weight, (name, role, linear) in parts.items():
        damage = checkpoint.record(weight)
        stored = model.read(model.initializers[weight])
        matrix = stored.T if linear is not None and not linear.stored_transposed else stored
        if damage is None:
            in_blocks = weight in layers.block_wise
            grid = replace(PROBE, symmetric=PROBE.symmetric or in_blocks)
            rounded = round_weight(np.asarray(matrix, np.float32), grid, None if in_blocks else linear).dequantize()
            damage = probe.damage(weight, np.ascontiguousarray(rounded if matrix is stored else rounded.T))
            checkpoint.keep_record(weight, damage)
        damages.append(LayerDamage(weight, name, role, matrix.shape, damage))
        advance()
    return damages


def weights_of(layers: Layers) -> dict[str, tuple[str, str, Linear | None]]:
    """Return weight -> (name, role, a linear layer that multiplies by it), those that stay float left out."""
    parts: dict[str, tuple[str, str, Linear | None]] = {}
    for linear in layers.linears:
        role = HEAD_ROLE if linear.weight in layers.block_wise else linear.role
        parts.setdefault(linear.weight, (linear.name, role, linear))
    for table in layers.embeddings:
        parts.setdefault(table.weight, (table.weight.removesuffix(".weight"), EMBEDDING_ROLE, None))
    return {weight: part for weight, part in parts.items() if weight in layers.grids}


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


def file_of(path: Path) -> Path:
    """Return the file itself, also when its bundle is given."""
    return path / FILE if path.is_dir() else path


def load(path: Path, layers: Layers, model: OnnxModel, method: str) -> list[LayerDamage]:
    """Read the damages of all layers from a file.

    Args:
        path: a file that `save` wrote, or a bundle that holds one.
        layers: those that will be quantized.
        model: the graph they are in.
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
    for weight, (name, _, linear) in weights_of(layers).items():
        dims = tuple(model.initializers[weight].dims)
        shape = dims if linear is None or linear.stored_transposed else dims[::-1]
        if weight not in known or known[weight].shape != shape:
            raise InputError(
                f"`{path}` is of another model: it has no layer `{name}` of shape {shape}", "measure anew without it"
            )
    return [known[weight] for weight in weights_of(layers)]
