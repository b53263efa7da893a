"""How far a text-generation model's predictions moved: KL divergence, top-1 agreement, perplexity.

kld = mean over positions of KL(baseline || candidate) in nats; perplexity = exp(mean -log p(next token)).
The baseline's logits of one window at a time pass through a memory-mapped file: O(seq_len * vocabulary)
memory, one forward pass per model and window. Windows do not overlap and their first token is not scored.
Perplexities compare only between models with the same tokenizer. Of an encoder-decoder, the predictions are
those of given targets (teacher forcing), and a pair of source and target is a window.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bundle import SEQ2SEQ_TASKS, ModelBundle
from llmfast.divergence import prediction_figures, prediction_sums
from llmfast.report import Column

ORDER = 60
KIND = "quality"
TASKS = ("text-generation", *SEQ2SEQ_TASKS)
NEEDS = ("tokenizer",)
UNIT = "windows"
DATA = "a UTF-8 text file (encoder-decoders: lines of source<TAB>target), for KL divergence and perplexity"
HIGHER_IS_BETTER = {"kld": False, "top1_agreement": True, "perplexity": False, "perplexity_ratio": False}
COLUMNS = (
    Column("KLD", "kld", lambda value: f"{value:.4f}"),
    Column("top-1 %", "top1_agreement", lambda value: f"{value * 100:.1f}"),
    Column("ppl x", "perplexity_ratio", lambda value: f"{value:.3f}"),
)


@dataclass(frozen=True)
class Window:
    """Tokens to predict, int64 [n], the first one given; and the source of an encoder-decoder, int64 [m]."""

    ids: np.ndarray
    source: np.ndarray | None = None


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[Window]:
    """Cut the text into windows of `seq_len` tokens, or encode pairs, with the baseline's tokenizer."""
    if bundle.manifest.task in SEQ2SEQ_TASKS:
        return _prepare_pairs(bundle, data, options)
    from llmfast.text import read_text, token_windows
    from llmfast.tokenizer import Tokenizer

    ids = np.array(Tokenizer.load(bundle.path).encode(read_text(data)), np.int64)
    return [Window(window) for window in token_windows(ids, options.num_samples, options.seq_len)]


def _prepare_pairs(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[Window]:
    from llmfast.infer.rules import read_rules
    from llmfast.text import read_translations
    from llmfast.tokenizer import Tokenizer

    rules = read_rules(bundle.path, bundle.manifest.architecture.get("context_length"))
    sources = Tokenizer.load(bundle.path)
    targets = Tokenizer.load_target(bundle.path)
    limit = min(options.seq_len, bundle.manifest.architecture.get("context_length") or options.seq_len)
    windows = []
    for source, target in read_translations(data)[: options.num_samples]:
        ids = [rules.decoder_start_token_id, *targets.encode(target, add_special_tokens=False)]
        ids += rules.eos_token_ids[:1]
        windows.append(Window(np.array(ids[:limit]), np.array(sources.encode(source)[:limit])))
    return windows


def answer(subject: Subject, window: Window) -> np.ndarray:
    """Return the logits at every position of a window, float32 [n, vocabulary]."""
    logits: np.ndarray
    if window.source is None:
        logits = subject.engine.score(window.ids)
    else:
        logits = subject.engine.score_target(window.source, window.ids)
    return logits


def compare(window: Window, logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the sums over a window's scored positions, as one unit.

    Args:
        window: its tokens.
        logits: float32 [seq_len, vocabulary].
        reference: the baseline's, of the same shape.

    Returns:
        float64 [1, 5] = positions, KL divergence, agreements, -log p(next), the baseline's -log p(next).
    """
    return prediction_sums(window.ids, logits, reference)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some windows from their sums, float64 [windows, 5]."""
    return prediction_figures(rows)
