"""Every bundle answers the tasks, and its scores are compared with the baseline's, document by document."""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from llmfast.bench.contestant import Contestant
from llmfast.bench.harness.tasks import Figure, Tasks
from llmfast.bench.options import BenchOptions
from llmfast.bench.quality import file_figures

# Of one figure: lm-eval's value of every document.
Values = list[Any]


class Scores:
    """The figures of one task or group, in the form of a metric of quality.

    Its rows are float64 [documents, 1], numbers of documents among those of all bundles; what lm-eval found of a
    document may be a number or, for BLEU, a pair of texts.
    """

    KIND = "quality"
    DATA = ""

    def __init__(self, figures: Sequence[Figure]) -> None:
        self._figures = figures
        self._values: dict[str, Values] = {figure.key: [] for figure in figures}
        self.HIGHER_IS_BETTER = {figure.key: figure.higher_is_better for figure in figures}
        self.COMPARED = tuple(self._values)

    def add(self, values: Mapping[str, Values]) -> np.ndarray:
        """Take what a bundle's documents scored, figure -> value of each, and return their rows."""
        count = len(next(iter(values.values())))
        first = len(next(iter(self._values.values())))
        for key, held in self._values.items():
            held += values[key]
        return np.arange(first, first + count, dtype=np.float64)[:, None]

    def figures(self, rows: np.ndarray) -> dict[str, float | None]:
        """Return the figures of some documents."""
        numbers = rows[:, 0].astype(int).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # draws in which a label is missing
            return {
                figure.key: float(figure.aggregate([self._values[figure.key][number] for number in numbers]))
                for figure in self._figures
            }


def metrics_of(tasks: Tasks) -> dict[str, Scores]:
    """Return task or group -> its figures as a metric."""
    figures = tasks.figures | {name: own for name, (own, _) in tasks.groups.items()}
    return {name: Scores(own) for name, own in figures.items()}


def measure_tasks(
    tasks: Tasks,
    metrics: Mapping[str, Scores],
    contestants: Sequence[Contestant],
    baseline: Contestant,
    options: BenchOptions,
    advance: Callable[..., None],
) -> dict[str, Any]:
    """Let every bundle answer, one after the other, and file figures, spreads, changes and verdicts.

    Returns:
        What the document says of the tasks.

    Raises:
        LlmfastError: the baseline failed.
    """
    rows: dict[Contestant, dict[str, np.ndarray]] = {}
    asked: dict[str, Any] = {}

    def answer(one: Contestant) -> None:
        values, questions = _evaluate(tasks, one, options, partial(_show, advance, one.label))
        rows[one] = {name: metrics[name].add(values[name]) for name in metrics}
        asked.update(questions)

    for one in [baseline, *(one for one in contestants if one is not baseline)]:
        if one.failure is None:
            one.attempt(partial(answer, one))
            one.stop()
        advance(1)
    for one, own in rows.items():
        for name, found in own.items():
            file_figures(one, metrics[name], found, rows[baseline][name], options.seed)
    figures = [*(figure for own in tasks.figures.values() for figure in own),
               *(figure for own, _ in tasks.groups.values() for figure in own)]  # fmt: skip
    return asked | {
        "names": list(options.tasks),
        "limit": options.limit,
        "figures": [
            {
                "key": figure.key,
                "task": figure.task,
                "metric": figure.metric if figure.filter == "none" else f"{figure.metric} {figure.filter}",
                "higher_is_better": figure.higher_is_better,
                "in_table": figure.task in tasks.shown,
            }
            for figure in figures
        ],
    }


def _show(advance: Callable[..., None], label: str, done: int, total: int) -> None:
    advance(0, f"tasks, request {done} of {total}: {label}")


def _evaluate(
    tasks: Tasks, one: Contestant, options: BenchOptions, show: Callable[[int, int], None]
) -> tuple[dict[str, dict[str, Values]], dict[str, Any]]:
    """Return task or group -> figure -> value of each document, and what was asked."""
    import lm_eval
    from lm_eval.evaluator import evaluate

    from llmfast.bench.harness.adapter import ContestantLM

    tasks.seed()
    model = ContestantLM(one, options, show)
    results = evaluate(model, tasks.loaded, limit=options.limit, bootstrap_iters=0)
    samples = results["samples"]
    values: dict[str, dict[str, Values]] = {}
    for name, figures in tasks.figures.items():
        values[name] = {
            figure.key: [sample[figure.metric] for sample in samples[name] if sample["filter"] == figure.filter]
            for figure in figures
        }
    for name, (figures, members) in tasks.groups.items():
        values[name] = {}
        for figure in figures:
            of_member = {member: _find(tasks.figures[member], figure) for member in members}
            values[name][figure.key] = [
                (number, value)
                for number, member in enumerate(members)
                if (own := of_member[member]) is not None
                for value in values[member][own.key]
            ]
    asked = {
        "lm_eval": lm_eval.__version__,
        "versions": {name: str(results["versions"].get(name, "")) for name in tasks.figures},
        "num_fewshot": {name: int(results["n-shot"].get(name) or 0) for name in tasks.figures},
        "documents": {name: int(results["n-samples"][name]["effective"]) for name in tasks.figures},
        "sha256": hashlib.sha256(
            "\0".join(sample["prompt_hash"] + sample["target_hash"] for name in sorted(samples)
                      for sample in samples[name]).encode()
        ).hexdigest(),
    }  # fmt: skip
    return values, asked


def _find(figures: Sequence[Figure], wanted: Figure) -> Figure | None:
    return next((one for one in figures if (one.metric, one.filter) == (wanted.metric, wanted.filter)), None)
