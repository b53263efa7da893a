"""How good translations are against references: BLEU and chrF, as sacrebleu computes them.

Both over the corpus, from the counts of single sentences (https://aclanthology.org/W18-6319). Languages are those that
the bundle's generation_config.json says. One search per source and model.
"""

import importlib.util
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.records import Records
from llmfast.report import Column, note

ORDER = 67
KIND = "quality"
TASKS = ("translation",)
NEEDS = ("tokenizer",)
UNIT = "sentences"
DATA = "the same lines, for BLEU and chrF (with sacrebleu: pip install 'llmfast[eval]')"
HIGHER_IS_BETTER = {"bleu": True, "chrf": True}
COMPARED = ("bleu", "chrf")
COLUMNS = (
    Column("BLEU", "bleu", lambda value: f"{value:.2f}"),
    Column("chrF", "chrf", lambda value: f"{value:.2f}"),
)

# Counts of a sentence in sacrebleu's BLEU: lengths of answer and reference, matches and n-grams of orders 1 to 4.
_BLEU_COUNTS = 10


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[tuple[str, ...]]:
    """Read sources and references; none where sacrebleu is missing."""
    if importlib.util.find_spec("sacrebleu") is None:
        note("note: no BLEU and chrF: sacrebleu is not installed; pip install 'llmfast[eval]'")
        return []
    return list(islice(Records(data, "source", "reference"), options.num_samples))


def answer(subject: Subject, item: tuple[str, ...]) -> np.ndarray:
    """Return the translation, a string [1]."""
    from llmfast.infer.rules import read_rules
    from llmfast.infer.search import search
    from llmfast.tokenizer import Tokenizer

    bundle = subject.bundle
    engine = subject.engine.engine
    source = np.array([subject.tokenizer.encode(item[0])[: engine.context_length]])
    engine.encode(source, np.ones_like(source))
    (found,) = search(engine, read_rules(bundle.path, engine.context_length))
    return np.array([Tokenizer.load_target(bundle.path).decode(found.ids).strip()])


def compare(item: tuple[str, ...], found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return a sentence's counts of matches with its reference translation, float64 [1, counts]."""
    answers, references = [str(found[0])], [[item[1]]]
    counts = [metric._extract_corpus_statistics(answers, references)[0] for metric in _metrics()]
    return np.array([[*counts[0], *counts[1]]], np.float64)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return BLEU and chrF of some sentences from their counts, float64 [sentences, counts]."""
    bleu, chrf = _metrics()
    counts = rows.sum(axis=0).astype(int).tolist()
    return {
        "bleu": float(bleu._compute_score_from_stats(counts[:_BLEU_COUNTS]).score),
        "chrf": float(chrf._compute_score_from_stats(counts[_BLEU_COUNTS:]).score),
    }


def _metrics() -> tuple[Any, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(), CHRF()
