"""How far a quantized graph's answers moved from the float graph's, on text that it was not calibrated on.

One sample is in memory at a time.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.bundle import TEXT_GENERATION, ModelBundle
from llmfast.errors import GateError, InputError, UnsupportedError
from llmfast.example_inputs import random_inputs
from llmfast.graph.feeds import DTYPES, PAST, GraphInput, graph_inputs, sequence_feeds
from llmfast.graph.linear import Linear
from llmfast.graph.model import OnnxModel
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.comparison import Comparison, Values
from llmfast.quantize.corpus import SHIPPED_HELD_OUT, Corpus, Sample, pick
from llmfast.quantize.replay import Replay
from llmfast.quantize.workpiece import Workpiece
from llmfast.report import note, progress
from llmfast.residency import bounded_residency
from llmfast.runtime import open_session
from llmfast.verdict import Gate

# Tokens of a sample that are scored: four samples of a small model take two seconds.
SEQ_LEN = 256
_RANDOM_LENGTH = 32  # of the axes that a graph leaves open
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_FLOAT = "tensor(float)"
_ACTIVATION_ROWS = 64
# Figures that --max-drop limits, and which way they get better.
HIGHER_IS_BETTER = {"top1_agreement": True, "cosine": True, "flipped_labels": False, "relative_error": False}

RowsOf = Callable[[Linear], np.ndarray | None]


def require_measured(measured: Mapping[str, Any], gates: Iterable[Gate]) -> None:
    """Refuse gates on figures by which the answers of a model are not compared.

    Args:
        measured: of a quantization, the figures among it.
        gates: on figures of quality.

    Raises:
        GateError: names the first.
    """
    figures = [name for name, value in measured.items() if isinstance(value, float)]
    missing = next((gate.figure for gate in gates if gate.figure not in figures), None)
    if missing is not None:
        compared = ", ".join(figures) or "nothing"
        raise GateError(
            f"`{missing}` is not measured: the answers of this model are compared by {compared}",
            "gate that: --max-kld for kld, --max-drop METRIC=VALUE for the others",
        )


@dataclass(frozen=True)
class HeldOut:
    """What two graphs are compared on.

    Attributes:
        samples: the inputs of each sample.
        text: what the manifest says of the text; None for random inputs.
    """

    samples: list[Values]
    text: dict[str, Any] | None


@dataclass(frozen=True)
class ProofText:
    """The text to compare on: `data`; else what the calibration leaves over, or a text that llmfast ships.

    Attributes:
        data: the text to use.
        calibration: the text that was calibrated on, and how much of it.
        calibrated: whether it was.
        num_samples: samples, at most.
    """

    data: Corpus | None
    calibration: Calibration
    calibrated: bool
    num_samples: int

    @property
    def is_named(self) -> bool:
        """Whether it is of the user's choice, so that nothing else will do."""
        return self.data is not None or self.calibration.path is not None

    def choose(self, read: Callable[[Corpus, int], list[Sample]]) -> tuple[Corpus, list[Sample]]:
        """Return the text, and the samples to compare on.

        Args:
            read: gives the samples of a text, of a length.

        Raises:
            InputError, UnsupportedError: as `read` does; too little text.
        """
        if self.data is not None:
            corpus, found = self.data, read(self.data, SEQ_LEN)
        else:
            corpus, found = _left_over(self.calibration, self.calibrated, read)
        chosen, _ = pick(found, self.num_samples, self.calibration.seed)
        return corpus, chosen


def hold_out(bundle: ModelBundle, model: OnnxModel, text: ProofText) -> HeldOut:
    """Choose the samples to compare on.

    A graph without a tokenizer, or with inputs that no text makes, gets random inputs.

    Args:
        bundle: the float bundle.
        model: its graph.
        text: to read them from.

    Raises:
        InputError: a text of the user's is too short, or there is no tokenizer for it.
    """
    inputs = graph_inputs(model.proto.graph)
    try:
        corpus, ids = text.choose(lambda one, seq_len: one.samples(bundle, seq_len))
        samples = [sequence_feeds(inputs, one[None, :SEQ_LEN]) for one in ids]
    except (InputError, UnsupportedError) as error:
        if text.is_named:
            raise
        note(f"note: `{model.path.name}` is compared on random inputs: {error.message}")
        return HeldOut(_random_samples(bundle, model, text.num_samples, text.calibration.seed or 0), None)
    return HeldOut(samples, {**corpus.describe(), "num_samples": len(samples)})


def _left_over(
    calibration: Calibration, calibrated: bool, read: Callable[[Corpus, int], list[Sample]]
) -> tuple[Corpus, list[Sample]]:
    """Return the text to compare on when the user named none: the calibration file's rest, or what llmfast ships.

    Args:
        calibration: the text that was calibrated on.
        calibrated: whether it was.
        read: gives the samples of a text, of a length.
    """
    if calibration.path is not None:
        used, rest = calibration.divide(read(calibration.corpus, calibration.seq_len))
        if rest or not calibrated:
            return calibration.corpus, rest if calibrated else [*used, *rest]
    corpus = Corpus(SHIPPED_HELD_OUT)
    return corpus, read(corpus, SEQ_LEN)


class Proof:
    """The comparison of a quantized bundle with its float one.

    Args:
        bundle: the float bundle.
        models: its graphs by role.
        text: the text to compare on.

    Attributes:
        text: what the manifest says of the text; None when all inputs are random.
    """

    def __init__(self, bundle: ModelBundle, models: Mapping[str, OnnxModel], text: ProofText) -> None:
        self._predicts_tokens = bundle.manifest.task == TEXT_GENERATION
        self._problem_type = problem_type_of(bundle)
        self._paths = {role: model.path for role, model in models.items()}
        # As they are now: transforms change them, and the graph of another exporter was adapted in memory.
        self._graphs = {role: model.proto.SerializeToString() for role, model in models.items()}
        if "decoder" in models:
            models = {"encoder": models["encoder"]}
        self._held_out = {role: hold_out(bundle, model, text) for role, model in models.items()}
        self.text = next((one.text for one in self._held_out.values() if one.text), None)

    def inputs_of(self, role: str, workpiece: Workpiece) -> RowsOf:
        """Return what gives some rows of each layer's input, asked for in the graph's order, on the first sample."""
        held_out = self._held_out.get(role)
        taken = held_out.samples[:1] if held_out else []
        # On random inputs errors of single layers say little.
        return input_rows(workpiece, [values for values in taken if self.text and "input_ids" in values])

    def compare(self, candidates: Mapping[str, OnnxModel]) -> dict[str, dict[str, float]]:
        """Run both on the same samples, and return the figures of each graph that can be compared."""
        start = time.perf_counter()
        known = {role: candidates[role] for role, one in self._held_out.items() if one.samples}
        compared = {role: self._compare(role, candidate) for role, candidate in known.items()}
        found = {role: figures for role, figures in compared.items() if figures}
        for path in (self._paths[role] for role in compared if role not in found):
            note(f"note: `{path.name}` can't be compared with the float model: it has no float outputs")
        if found:
            where = self.text["name"] if self.text else "random inputs"
            count = max(len(one.samples) for one in self._held_out.values())
            note(f"compared with the float model on {count} samples of {where}: {time.perf_counter() - start:.1f} s")
        return found

    def _compare(self, role: str, candidate: OnnxModel) -> dict[str, float]:
        path = self._paths[role]
        # Weights as they lie in the file: ordered for speed they would take the float model's size in memory.
        theirs = open_session(path, spin=False, graph=self._graphs[role], prepack=False)
        ours = open_session(candidate.path, spin=False)
        names = [output.name for output in ours.get_outputs()]
        comparison = Comparison(names, self._predicts_tokens, self._problem_type)
        samples = self._held_out[role].samples
        with bounded_residency(path.parent), progress("comparing with the float model", len(samples)) as advance:
            for values in samples:
                reference = theirs.run(comparison.outputs, values)
                comparison.add(values, ours.run(comparison.outputs, _with_own_cache(values, ours)), reference)
                advance()
        return comparison.figures()


def problem_type_of(bundle: ModelBundle) -> str:
    """Return what kind of classifier a bundle is, as of `choices_of`."""
    return str(bundle.manifest.architecture.get("problem_type", ""))


def worst(compared: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the worst of each figure over the graphs of a bundle."""
    values: dict[str, list[float]] = {}
    for figures in compared:
        for key, value in figures.items():
            values.setdefault(key, []).append(value)
    return {key: min(ones) if HIGHER_IS_BETTER.get(key) else max(ones) for key, ones in values.items()}


def input_rows(workpiece: Workpiece, samples: Sequence[Mapping[str, np.ndarray]]) -> RowsOf:
    """Return what gives some rows of each layer's input, asked for in the graph's order; None without a sample.

    Args:
        workpiece: the float graph with its edits.
        samples: the graph's inputs, of one sample or none.
    """
    replay = Replay(workpiece.model, samples, workpiece.edits.snapshot())
    last: dict[str, np.ndarray] = {}

    def rows_of(linear: Linear) -> np.ndarray | None:
        if not samples:
            return None
        if linear.input not in last:
            (value,) = replay.until(linear.input)
            rows = value.reshape(-1, value.shape[-1])
            last.clear()
            last[linear.input] = rows[:: -(-len(rows) // _ACTIVATION_ROWS)]
        return last[linear.input]

    return rows_of


def _with_own_cache(values: Values, session: Any) -> dict[str, np.ndarray]:
    """Return a sample whose empty cache is of the type that the graph stores, which may be int8."""
    caches = {entry.name: DTYPES[entry.type] for entry in session.get_inputs() if entry.name.startswith(PAST)}
    return {name: value.astype(caches.get(name, value.dtype), copy=False) for name, value in values.items()}


def _random_samples(bundle: ModelBundle, model: OnnxModel, count: int, seed: int) -> list[Values]:
    """Return samples that the graph runs on, none when it refuses random inputs, with a note."""
    rng = np.random.default_rng(seed)
    try:
        if "example_inputs" in bundle.manifest.architecture:
            samples = [random_inputs(bundle, (seed, number)) for number in range(count)]
        else:
            inputs = graph_inputs(model.proto.graph)
            samples = [_random_values(model, inputs, rng) for _ in range(count)]
        session = open_session(model.path, spin=False, graph=model.proto.SerializeToString(), prepack=False)
        session.run(None, samples[0])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        reason = error.message if isinstance(error, UnsupportedError) else str(error).strip().splitlines()[0][:200]
        note(f"note: `{model.path.name}` is not compared with the float model: {reason}")
        return []
    return samples


def _random_values(model: OnnxModel, inputs: Sequence[GraphInput], rng: np.random.Generator) -> Values:
    """Return normal floats, and integers below the rows of the table that they look up in, or 2."""
    values = {}
    for value in inputs:
        first = [size if isinstance(size, int) else 1 for size in value.shape[:1]]  # batch
        shape = first + [size if isinstance(size, int) else _RANDOM_LENGTH for size in value.shape[1:]]
        if value.type == _FLOAT:
            values[value.name] = rng.standard_normal(shape).astype(np.float32)
        elif value.type in _INTEGERS:
            values[value.name] = rng.integers(_num_rows(model, value.name), size=shape).astype(_INTEGERS[value.type])
        else:
            raise UnsupportedError(f"no random values of type {value.type} for input `{value.name}`")
    return values


def _num_rows(model: OnnxModel, indices: str) -> int:
    nodes = [node for node in model.proto.graph.node if node.op_type == "Gather" and node.input[1] == indices]
    tables = [model.initializers[node.input[0]] for node in nodes if node.input[0] in model.initializers]
    return min((table.dims[0] for table in tables), default=2)
