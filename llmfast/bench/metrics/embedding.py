"""How far an embedding model's vectors moved: rank correlation with human scores, recall, cosine to the baseline's.

spearman = correlation of the ranks of cos(a, b) and of the scores, over all pairs (1 = same order); recall_at_k = share
of queries whose document is among the k nearest of all documents by cosine; cosine_to_baseline = mean cosine between a
text's vector and the one the baseline gives it. O(texts) forward passes; recall compares each query with each document.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.statistics import spearman
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.divergence import cosines
from llmfast.records import Mapped, Records
from llmfast.report import Column

ORDER = 70
KIND = "quality"
TASKS = ("feature-extraction",)
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = (
    "lines of score<TAB>sentence<TAB>sentence for rank correlation, of query<TAB>document for recall, or a text a "
    "line; or CSV, TSV, JSONL"
)
HIGHER_IS_BETTER = {"spearman": True, "recall_at_1": True, "recall_at_10": True, "cosine_to_baseline": True}
COMPARED = ("spearman", "recall_at_1", "recall_at_10")
COLUMNS = (
    Column("spearman", "spearman", lambda value: f"{value:.4f}"),
    Column("recall@1 %", "recall_at_1", lambda value: f"{value * 100:.1f}"),
    Column("recall@10 %", "recall_at_10", lambda value: f"{value * 100:.1f}"),
    Column("cosine", "cosine_to_baseline", lambda value: f"{value:.5f}"),
)

_BATCH = 8
_QUERIES = 256  # whose similarities to all documents are in memory at once
# Fields of a unit before its vectors.
_FIELDS = 4


@dataclass(frozen=True)
class Texts:
    """Some texts, alone or in pairs.

    Attributes:
        texts: the texts; of pairs all first ones, then all second ones.
        scores: one per pair, empty where none are given.
        are_queries: the pairs are queries and their documents.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...] = ()
    are_queries: bool = False


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> Collection[Texts]:
    """Read scored pairs, queries with documents, or single texts, whichever the first line has; every line is used."""
    if Records.fits(data, "score", "a", "b"):
        return Mapped(Records(data, "score", "a", "b", numeric=("score",)).batches(_BATCH), _scored)
    if Records.fits(data, "query", "document"):
        return Mapped(Records(data, "query", "document").batches(_BATCH), _queries)
    records = Records(data, "text", parse=lambda line: (line,))
    return Mapped(records.batches(_BATCH), lambda batch: Texts(tuple(text for (text,) in batch)))


def _scored(batch: tuple[tuple[str, ...], ...]) -> Texts:
    scores, first, second = zip(*batch, strict=True)
    return Texts((*first, *second), tuple(map(float, scores)))


def _queries(batch: tuple[tuple[str, ...], ...]) -> Texts:
    first, second = zip(*batch, strict=True)
    return Texts((*first, *second), are_queries=True)


def answer(subject: Subject, item: Texts) -> np.ndarray:
    """Return the texts' vectors, float32 [texts, hidden_size]."""
    vectors: np.ndarray = subject.task.embed(subject.session, subject.encode(item.texts))
    return vectors


def compare(item: Texts, vectors: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row per pair, or per text.

    Args:
        item: the texts.
        vectors: float32 [texts, hidden_size].
        reference: the baseline's.

    Returns:
        float64 [units, 4] = its score, the pair's cosine, the cosine to the baseline, 0; of queries
        [units, 4 + 2 * hidden_size], with both vectors, and 1 in the fourth field. NaN where a text has no partner or
        score, and in the third field where vectors have another size than the baseline's.
    """
    same_size = vectors.shape == reference.shape
    moved = cosines(vectors, reference) if same_size else np.full(len(vectors), np.nan)
    if not item.scores and not item.are_queries:
        unpaired, single = np.full(len(vectors), np.nan), np.zeros(len(vectors))
        return np.stack([unpaired, unpaired, moved, single], axis=1)
    first, second = np.split(vectors, 2)
    scores = np.array(item.scores) if item.scores else np.full(len(first), np.nan)
    both = moved.reshape(2, -1).mean(axis=0)
    fields = [scores, cosines(first, second), both, np.full(len(first), float(item.are_queries))]
    rows: np.ndarray = np.stack(fields, axis=1)
    with_vectors: np.ndarray = np.hstack([rows, first, second])
    return with_vectors if item.are_queries else rows


def finish(rows: np.ndarray) -> np.ndarray:
    """Return float64 [units, 4] = score, cosine of the pair, cosine to the baseline, rank of a query's document.

    The rank counts the documents that are nearer to the query than its own, NaN where there are no queries.
    """
    fields: np.ndarray = rows[:, :_FIELDS].copy()
    fields[:, 3] = np.nan
    if rows.shape[1] == _FIELDS:
        return fields
    queries, documents = (
        part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        for part in np.split(rows[:, _FIELDS:], 2, axis=1)
    )
    for start in range(0, len(queries), _QUERIES):
        similar = queries[start : start + _QUERIES] @ documents.T
        own = similar[np.arange(len(similar)), start + np.arange(len(similar))]
        fields[start : start + _QUERIES, 3] = (similar > own[:, None]).sum(axis=1)
    return fields


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some pairs or texts from what `finish` made of their rows, float64 [units, 4]."""
    scores, similarities, moved, ranks = rows.T
    is_ranked = not np.isnan(ranks).any()
    return {
        "spearman": spearman(scores, similarities),
        "recall_at_1": float((ranks < 1).mean()) if is_ranked else None,
        "recall_at_10": float((ranks < 10).mean()) if is_ranked else None,
        "cosine_to_baseline": float(moved.mean()),
    }
