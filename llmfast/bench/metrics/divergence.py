"""How far a text-generation model's predictions moved: KL divergence, top-1 agreement, perplexity, bits per byte.

kld = mean over positions of KL(baseline || candidate) in nats, with median, 99th percentile and maximum;
perplexity = exp(mean -log p(next token)); bits_per_byte = -log2 p of the text / its bytes in UTF-8.
The baseline's logits of one window at a time pass through a memory-mapped file: O(seq_len * vocabulary)
memory, one forward pass per model and window. Windows do not overlap; their first `context_tokens` tokens are not
scored. llama-perplexity scores the second half of each window: `--context-tokens 257 --seq-len 512`.
Between models of different tokenizers only bits per byte compare: each scores the same passages in its own tokens.
Of an encoder-decoder, the predictions are those of given targets (teacher forcing), and a pair of source and target
is a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bench.workload import SEQ_LEN
from llmfast.bundle import SEQ2SEQ_TASKS, ModelBundle
from llmfast.divergence import position_figures, prediction_figures
from llmfast.errors import OptionError
from llmfast.records import Records
from llmfast.report import Column
from llmfast.runtime import usable_cores

if TYPE_CHECKING:
    from llmfast.tokenizer import Tokenizer

ORDER = 60
KIND = "quality"
TASKS = ("text-generation", *SEQ2SEQ_TASKS)
NEEDS = ("tokenizer",)
UNIT = "windows"
DATA = "a UTF-8 text file (encoder-decoders: lines of source<TAB>target), for KL divergence and perplexity"
HIGHER_IS_BETTER = {
    "kld": False,
    "kld_median": False,
    "kld_p99": False,
    "kld_max": False,
    "top1_agreement": True,
    "perplexity": False,
    "perplexity_ratio": False,
    "bits_per_byte": False,
}
COMPARED = ("perplexity", "bits_per_byte")
COLUMNS = (
    Column("KLD", "kld", lambda value: f"{value:.4f}"),
    Column("KLD p99", "kld_p99", lambda value: f"{value:.3f}"),
    Column("top-1 %", "top1_agreement", lambda value: f"{value * 100:.1f}"),
    Column("ppl x", "perplexity_ratio", lambda value: f"{value:.3f}"),
    Column("bits/byte", "bits_per_byte", lambda value: f"{value:.4f}"),
)

# Fields of a unit before the divergences of its positions.
_POSITIONS, _KLD, _AGREEMENTS, _NLL, _BASELINE_NLL, _BYTES = range(6)


@dataclass(frozen=True)
class Window:
    """Tokens to predict, and what they stand for.

    Attributes:
        ids: int64 [n]; the first ones are given.
        num_bytes: of the scored tokens' text in UTF-8.
        width: positions that the longest window has.
        context_tokens: how many tokens are given.
        source: of an encoder-decoder, int64 [m].
        text: what the scored tokens say.
        is_comparable: the tokens are the baseline's.
    """

    ids: np.ndarray
    num_bytes: int = 0
    width: int = 0
    context_tokens: int = 1
    source: np.ndarray | None = None
    text: str = ""
    is_comparable: bool = True


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[Window]:
    """Cut the text into windows of `seq_len` tokens, or encode pairs, with the baseline's tokenizer."""
    seq_len = options.seq_len or SEQ_LEN
    if options.context_tokens >= seq_len:
        raise OptionError(f"--context-tokens {options.context_tokens}: a window has {seq_len} tokens", "give fewer")
    if bundle.manifest.task in SEQ2SEQ_TASKS:
        return _prepare_pairs(bundle, data, options, seq_len)
    from llmfast.text import leading_windows
    from llmfast.tokenizer import Tokenizer

    given = options.context_tokens
    windows = leading_windows(data, Tokenizer.load(bundle.path), options.num_samples, seq_len, given)
    return [Window(ids, len(text.encode()), seq_len, given, None, text) for ids, text in windows]


def retokenize(bundle: ModelBundle, windows: Sequence[Window]) -> list[Window]:
    """Return the windows' scored texts in the tokens of a bundle with another tokenizer, as far as its context goes."""
    from llmfast.tokenizer import Tokenizer

    tokenizer, longest = Tokenizer.load(bundle.path), bundle.manifest.architecture.get("context_length")
    return [_in_tokens_of(tokenizer, window, longest) for window in windows]


def _in_tokens_of(tokenizer: "Tokenizer", window: Window, longest: int | None) -> Window:
    ids, ends = tokenizer.encode_spans(window.text)
    ids = ids[:longest]
    scored = window.text[int(ends[0]) : int(ends[len(ids) - 1])]
    return Window(ids, len(scored.encode()), window.width, is_comparable=False)


def _prepare_pairs(bundle: ModelBundle, data: Path, options: BenchOptions, seq_len: int) -> list[Window]:
    from llmfast.infer.sources import PairEncoder

    encoder = PairEncoder(bundle, seq_len)
    return [
        Window(encoder.target(target), len(target.encode()), encoder.limit, source=encoder.source(source))
        for source, target in islice(Records(data, "source", "reference"), options.num_samples)
    ]


def answer(subject: Subject, window: Window) -> np.ndarray:
    """Return the logits at every position of a window, float32 [n, vocabulary]."""
    logits: np.ndarray
    if window.source is None:
        logits = subject.engine.score(window.ids)
    else:
        logits = subject.engine.score_target(window.source, window.ids)
    return logits


def compare(window: Window, logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the sums over a window's scored positions and their single divergences, as one unit.

    Args:
        window: its tokens.
        logits: float32 [n, vocabulary].
        reference: the baseline's, of the same shape.

    Returns:
        float64 [1, 6 + width] = positions, KL divergence, agreements, -log p(next), the baseline's -log p(next),
        bytes, and the divergence of each position, NaN where there is none. Without the baseline's tokens, NaN for
        all but the bytes and -log p(next).
    """
    is_itself = logits is reference or not window.is_comparable
    figures = position_figures(window.ids, logits, None if is_itself else reference, usable_cores())
    figures = figures[window.context_tokens - 1 :]
    width = max(window.width, len(figures)) if window.is_comparable else window.width
    row = np.full((1, 6 + width), np.nan)
    row[0, :6] = (len(figures), *figures.sum(axis=0), window.num_bytes)
    if window.is_comparable:
        row[0, 6 : 6 + len(figures)] = figures[:, 0]
    else:
        row[0, [_POSITIONS, _KLD, _AGREEMENTS, _BASELINE_NLL]] = np.nan
    return row


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some windows from their rows, float64 [windows, 6 + width]."""
    sums, divergences = rows[:, :6].sum(axis=0), rows[:, 6:]
    found = prediction_figures(rows[:, :_BYTES])
    divergences = divergences[~np.isnan(divergences)]
    median, p99, highest = np.quantile(divergences, [0.5, 0.99, 1.0]) if len(divergences) else [np.nan] * 3
    found |= {"kld_median": float(median), "kld_p99": float(p99), "kld_max": float(highest)}
    return found | {"bits_per_byte": float(sums[_NLL] / np.log(2) / sums[_BYTES]) if sums[_BYTES] else None}
