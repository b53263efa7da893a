"""How often a question's answer is right, and how often it is another than the baseline's.

exact_match = share of questions whose answer is one of those given, both in lower case and without punctuation and
articles, as SQuAD counts; changed_answers = share with another answer than the baseline's. O(questions) forward passes.
"""

import re
import string
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.records import Mapped, Records
from llmfast.report import Column

ORDER = 82
KIND = "quality"
TASKS = ("question-answering",)
NEEDS = ("tokenizer",)
UNIT = "lines"
DATA = "lines of question<TAB>context, for changed answers, and <TAB>answer after it for exact match"
HIGHER_IS_BETTER = {"exact_match": True, "changed_answers": False}
COMPARED = ("exact_match",)
COLUMNS = (
    Column("exact match %", "exact_match", lambda value: f"{value * 100:.1f}"),
    Column("changed answers %", "changed_answers", lambda value: f"{value * 100:.1f}"),
)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """A question, a text that holds the answer, and the answers that are right, if known."""

    question: str
    context: str
    answers: tuple[str, ...]


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> Collection[Question]:
    """Read the questions; every line is used."""
    records = Records(data, "question", "context", "answer", optional=1)
    return Mapped(records, lambda record: Question(record[0], record[1], tuple(filter(None, record[2].split("\t")))))


def answer(subject: Subject, item: Question) -> np.ndarray:
    """Return the answer, a string [1]."""
    [found] = subject.task.find_answers(
        subject.session, subject.tokenizer, subject.bundle.longest_text(), item.question, [item.context]
    )
    return np.array([found["answer"]])


def compare(item: Question, found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return a row, float64 [1, 2] = is right (NaN when that is not known), differs from the baseline."""
    ours = _normalize(str(found[0]))
    is_right = float(ours in map(_normalize, item.answers)) if item.answers else np.nan
    return np.array([[is_right, ours != _normalize(str(reference[0]))]], np.float64)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some questions from their rows, float64 [questions, 2]."""
    right, changed = rows.T
    known = right[~np.isnan(right)]
    return {"exact_match": float(known.mean()) if len(known) else None, "changed_answers": float(changed.mean())}


def _normalize(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
