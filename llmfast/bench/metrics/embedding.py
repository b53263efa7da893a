"""How far an embedding model's vectors moved: rank correlation with human scores, cosine to the baseline's.

spearman = correlation of the ranks of cos(a, b) and of the scores, over all pairs (1 = same order);
cosine_to_baseline = mean cosine between a text's vector and the one the baseline gives it.
O(texts) forward passes. Pairs (STS-B's form) give both, plain lines only the second.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.statistics import spearman
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.divergence import cosines
from llmfast.report import Column

ORDER = 70
KIND = "quality"
TASKS = ("feature-extraction",)
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = "lines of score<TAB>sentence<TAB>sentence for rank correlation, or a text a line"
HIGHER_IS_BETTER = {"spearman": True, "cosine_to_baseline": True}
COMPARED = ("spearman",)
COLUMNS = (
    Column("spearman", "spearman", lambda value: f"{value:.4f}"),
    Column("cosine", "cosine_to_baseline", lambda value: f"{value:.5f}"),
)

_BATCH = 8


@dataclass(frozen=True)
class Texts:
    """Some texts, alone or in pairs.

    Attributes:
        texts: the texts; of pairs all first ones, then all second ones.
        scores: one per pair, empty when the texts stand alone.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...] = ()


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[Texts]:
    """Read scored pairs, known by the two tabs of their first line, or single texts; every line is used."""
    from llmfast.text import read_lines, read_pairs

    lines = read_lines(data)
    if lines[0].count("\t") != 2:
        return [Texts(tuple(lines[start : start + _BATCH])) for start in range(0, len(lines), _BATCH)]
    pairs = read_pairs(data)
    batches = [pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH)]
    return [_texts_of(batch) for batch in batches]


def answer(subject: Subject, item: Texts) -> np.ndarray:
    """Return the texts' vectors, float32 [texts, hidden_size]."""
    vectors: np.ndarray = subject.task.embed(subject.session, subject.encode(item.texts))
    return vectors


def compare(item: Texts, vectors: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row per pair, or per text: its score, the pair's cosine, and the cosine to the baseline.

    Args:
        item: the texts.
        vectors: float32 [texts, hidden_size].
        reference: the baseline's.

    Returns:
        float64 [units, 3]; a text without a partner has NaN in the first two, vectors of another size than
        the baseline's in the third.
    """
    same_size = vectors.shape == reference.shape
    moved = cosines(vectors, reference) if same_size else np.full(len(vectors), np.nan)
    if not item.scores:
        unpaired = np.full(len(vectors), np.nan)
        return np.stack([unpaired, unpaired, moved], axis=1)
    first, second = np.split(vectors, 2)
    return np.stack([item.scores, cosines(first, second), moved.reshape(2, -1).mean(axis=0)], axis=1)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some pairs or texts from their rows, float64 [units, 3]."""
    scores, similarities, moved = rows.T
    return {"spearman": spearman(scores, similarities), "cosine_to_baseline": float(moved.mean())}


def _texts_of(pairs: list[tuple[float, str, str]]) -> Texts:
    scores, first, second = zip(*pairs, strict=True)
    return Texts((*first, *second), scores)
