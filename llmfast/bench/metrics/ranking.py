"""How far a re-ranker's order of documents moved: the rank correlation of its logits with the baseline's.

rank_correlation = correlation of the ranks that both give to all pairs (1 = same order). O(pairs) forward passes.
"""

from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.statistics import spearman
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.report import Column

ORDER = 83
KIND = "quality"
TASKS = ("text-ranking",)
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = "lines of query<TAB>document, for the rank correlation with the baseline"
HIGHER_IS_BETTER = {"rank_correlation": True}
COMPARED: tuple[str, ...] = ()
COLUMNS = (Column("rank corr.", "rank_correlation", lambda value: f"{value:.4f}"),)

_BATCH = 8


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[tuple[tuple[str, str], ...]]:
    """Read the pairs in batches; every line is used."""
    from llmfast.text import read_lines

    pairs = []
    for number, line in enumerate(read_lines(data), start=1):
        query, tab, document = line.partition("\t")
        if not tab:
            raise InputError(f"no document in `{data}`: pair {number}", "each line is query<TAB>document")
        pairs.append((query, document))
    return [tuple(pairs[start : start + _BATCH]) for start in range(0, len(pairs), _BATCH)]


def answer(subject: Subject, pairs: tuple[tuple[str, str], ...]) -> np.ndarray:
    """Return the logit of each pair, float32 [pairs]."""
    scores: np.ndarray = subject.task.score_pairs(subject.session, subject.encode(pairs))
    return scores


def compare(pairs: tuple[tuple[str, str], ...], scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row per pair, float64 [pairs, 2] = its logit, the baseline's."""
    return np.stack([scores, reference], axis=1).astype(np.float64)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some pairs from their rows, float64 [pairs, 2]."""
    return {"rank_correlation": spearman(rows[:, 0], rows[:, 1])}
