"""How far answers moved: divergence of predictions, cosine of vectors, for benchmarks and for quantization.

kld = mean over positions of KL(baseline || candidate) in nats; perplexity = exp(mean -log p(next token)).
"""

import numpy as np

# Positions whose softmax is in memory as float64 at a time: 32 x 152k x 8 bytes = 39 MB.
_CHUNK = 32


def prediction_sums(ids: np.ndarray, logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the sums over a window's scored positions, as one unit; the first token is not scored.

    Args:
        ids: int64 [seq_len].
        logits: float32 [seq_len, vocabulary].
        reference: the baseline's, of the same shape.

    Returns:
        float64 [1, 5] = positions, KL divergence, agreements, -log p(next), the baseline's -log p(next).
    """
    sums = np.zeros(5)
    scored = len(ids) - 1
    for start in range(0, scored, _CHUNK):
        stop = min(start + _CHUNK, scored)
        ours, theirs = log_softmax(logits[start:stop]), log_softmax(reference[start:stop])
        rows, following = np.arange(stop - start), ids[start + 1 : stop + 1]
        sums += (
            stop - start,
            kl_divergence(ours, theirs).sum(),
            (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum(),
            -ours[rows, following].sum(),
            -theirs[rows, following].sum(),
        )
    return sums[None]


def prediction_figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some windows from their sums, float64 [windows, 5]."""
    positions, kld, agreements, nll, baseline_nll = rows.sum(axis=0)
    with np.errstate(over="ignore"):
        return {
            "kld": kld / positions,
            "top1_agreement": agreements / positions,
            "perplexity": np.exp(nll / positions),
            "perplexity_ratio": np.exp((nll - baseline_nll) / positions),
        }


def log_softmax(logits: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Return log p over the last axis, computed in `dtype`."""
    logits = logits.astype(dtype)
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def kl_divergence(log_p: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return KL(reference || p) of each row in nats, from log probabilities [..., classes]."""
    # p log(p/q) is 0 where p is 0, also where both logits are -inf (masked vocabulary).
    gap = np.subtract(reference, log_p, out=np.zeros_like(reference), where=reference > -np.inf)
    divergence: np.ndarray = (np.exp(reference) * gap).sum(axis=-1)
    return divergence


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows, float64; 0 where a row is zero."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    values: np.ndarray = (left * right).sum(axis=-1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return values
