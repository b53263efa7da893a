"""How far a re-ranker's order of documents moved: the rank correlation of its logits with the baseline's.

rank_correlation = correlation of the ranks that both give to all pairs (1 = same order). O(pairs) forward passes.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.statistics import spearman
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.records import Records
from llmfast.report import Column

ORDER = 83
KIND = "quality"
TASKS = ("text-ranking",)
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = "lines of query<TAB>document, or CSV, TSV, JSONL, for the rank correlation with the baseline"
HIGHER_IS_BETTER = {"rank_correlation": True}
COMPARED: tuple[str, ...] = ()
COLUMNS = (Column("rank corr.", "rank_correlation", lambda value: f"{value:.4f}"),)

_BATCH = 8


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> Collection[tuple[tuple[str, ...], ...]]:
    """Read the pairs in batches; every line is used."""
    return Records(data, "query", "document").batches(_BATCH)


def answer(subject: Subject, pairs: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """Return the logit of each pair, float32 [pairs]."""
    encoded = subject.encode([(query, document) for query, document in pairs])
    scores: np.ndarray = subject.task.score_pairs(subject.session, encoded)
    return scores


def compare(pairs: tuple[tuple[str, ...], ...], scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row per pair, float64 [pairs, 2] = its logit, the baseline's."""
    return np.stack([scores, reference], axis=1).astype(np.float64)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some pairs from their rows, float64 [pairs, 2]."""
    return {"rank_correlation": spearman(rows[:, 0], rows[:, 1])}
