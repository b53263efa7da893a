"""How far a text-generation model's predictions moved: KL divergence, top-1 agreement, perplexity.

kld = mean over positions of KL(baseline || candidate) in nats; perplexity = exp(mean -log p(next token)).
The baseline's logits of one window at a time pass through a memory-mapped file: O(seq_len * vocabulary)
memory, one forward pass per model and window. Windows do not overlap and their first token is not scored.
Perplexities compare only between models with the same tokenizer.
"""

from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.divergence import prediction_figures, prediction_sums
from llmfast.report import Column

ORDER = 60
KIND = "quality"
TASKS = ("text-generation",)
NEEDS = ("tokenizer",)
UNIT = "windows"
DATA = "a UTF-8 text file, for KL divergence, top-1 agreement and perplexity"
HIGHER_IS_BETTER = {"kld": False, "top1_agreement": True, "perplexity": False, "perplexity_ratio": False}
COLUMNS = (
    Column("KLD", "kld", lambda value: f"{value:.4f}"),
    Column("top-1 %", "top1_agreement", lambda value: f"{value * 100:.1f}"),
    Column("ppl x", "perplexity_ratio", lambda value: f"{value:.3f}"),
)


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[np.ndarray]:
    """Cut the text into windows of token ids, int64 [seq_len], with the baseline's tokenizer."""
    from llmfast.text import read_text, token_windows
    from llmfast.tokenizer import Tokenizer

    ids = np.array(Tokenizer.load(bundle.path).encode(read_text(data)), np.int64)
    return list(token_windows(ids, options.num_samples, options.seq_len))


def answer(subject: Subject, ids: np.ndarray) -> np.ndarray:
    """Return the logits at every position of a window, float32 [seq_len, vocabulary]."""
    logits: np.ndarray = subject.engine.score(ids)
    return logits


def compare(ids: np.ndarray, logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the sums over a window's scored positions, as one unit.

    Args:
        ids: int64 [seq_len].
        logits: float32 [seq_len, vocabulary].
        reference: the baseline's, of the same shape.

    Returns:
        float64 [1, 5] = positions, KL divergence, agreements, -log p(next), the baseline's -log p(next).
    """
    return prediction_sums(ids, logits, reference)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some windows from their sums, float64 [windows, 5]."""
    return prediction_figures(rows)
