"""What a classifier misses of one label, at the threshold that the costs of mistakes ask for.

Where missing a case of the label costs X times what a false alarm does, a case is flagged from a score of 1 / (1 + X)
on: that is where the expected costs of both mistakes are equal (Elkan, The Foundations of Cost-Sensitive Learning,
IJCAI 2001, section 1). The threshold follows from the costs alone and is the same for all bundles.

false_negative_rate = share of the label's cases that are not flagged; false_positive_rate = share of the others that
are; cost_per_case = mean over all cases of X for each one missed and 1 for each false alarm. O(texts) forward passes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.bench.labelled import LINES, Examples, number_of, read_examples
from llmfast.bench.options import BenchOptions, parse_cost
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.records import Mapped
from llmfast.report import Column
from llmfast.tasks._encoder import label_scores

ORDER = 84
KIND = "quality"
TASKS = ("audio-classification", "image-classification", "text-classification")
NEEDS = ("tokenizer",)
OPTION = "false_negative_cost"
UNIT = "lines"
DATA = f"{LINES}, for what is missed of a label"
HIGHER_IS_BETTER = {"false_negative_rate": False, "false_positive_rate": False, "cost_per_case": False}
COMPARED = tuple(HIGHER_IS_BETTER)
COLUMNS = (
    Column("missed %", "false_negative_rate", lambda value: f"{value * 100:.1f}"),
    Column("false alarms %", "false_positive_rate", lambda value: f"{value * 100:.1f}"),
    Column("cost/case", "cost_per_case", "{:.3f}".format),
)


@dataclass(frozen=True)
class Cases:
    """Examples, the number and name of the label to find in them, and what missing it costs."""

    examples: Examples
    label: int
    name: str
    cost: float


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> Collection[Cases]:
    """Read labelled lines in batches; every line is used.

    Raises:
        InputError: as `read_examples` does, or the model lacks the label to find.
    """
    assert options.false_negative_cost is not None
    label, cost = parse_cost(options.false_negative_cost)
    names = list(bundle.manifest.architecture.get("labels") or ())
    number = number_of(label, names, "--false-negative-cost")
    name = names[number] if names else ""
    return Mapped(read_examples(bundle, data), lambda examples: Cases(examples, number, name, cost))


def answer(subject: Subject, item: Cases) -> np.ndarray:
    """Return the label's score of each text, float64 [texts], as `infer` gives it."""
    logits = subject.task.classify(subject.session, subject.encode(item.examples.texts))
    names = [str(name).casefold() for name in subject.bundle.manifest.architecture.get("labels") or []]
    known = item.name.casefold()
    label = names.index(known) if known in names else item.label  # a bundle may number its labels in another order
    return np.array([label_scores(row, subject.bundle)[label] for row in logits])


def compare(item: Cases, scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return a row for each text, float64 [texts, 3] = has the label, is flagged, what missing it costs."""
    wanted = np.array(item.examples.labels) == item.label
    return np.stack([wanted, scores >= 1 / (1 + item.cost), np.full(len(scores), item.cost)], axis=1, dtype=np.float64)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some texts from their rows, float64 [texts, 3]; None of what does not occur."""
    wanted, flagged, cost = rows[:, 0] > 0, rows[:, 1] > 0, rows[:, 2]
    missed, alarms = wanted & ~flagged, ~wanted & flagged
    return {
        "false_negative_rate": float(missed.sum() / wanted.sum()) if wanted.any() else None,
        "false_positive_rate": float(alarms.sum() / (~wanted).sum()) if not wanted.all() else None,
        "cost_per_case": float((cost * missed + alarms).mean()),
    }
