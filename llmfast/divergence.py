"""How far answers moved: divergence of predictions, cosine of vectors, for benchmarks and for quantization.

kld = mean over positions of KL(baseline || candidate) in nats; perplexity = exp(mean -log p(next token)).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Elements of the logits that are worked on at a time: with their copies they stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 17

# Divergences below this are computed again in float64: float32 leaves an error of 1e-9.
_CLOSE = 2e-4


def prediction_sums(ids: np.ndarray, logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the sums over a window's scored positions, as one unit; the first token is not scored.

    Args:
        ids: int64 [seq_len].
        logits: float32 [seq_len, vocabulary].
        reference: the baseline's, of the same shape.

    Returns:
        float64 [1, 5] = positions, KL divergence, agreements, -log p(next), the baseline's -log p(next).
    """
    return np.array([[len(ids) - 1, *position_figures(ids, logits, reference).sum(axis=0)]])


def position_figures(
    ids: np.ndarray, logits: np.ndarray, reference: np.ndarray | None = None, threads: int = 1
) -> np.ndarray:
    """Return what a model predicts at each position but the last, against what it should and what a baseline does.

    Exponentials are taken in float32 and summed in float64; the difference to float64 throughout is below
    1e-5 of the figure.

    Args:
        ids: int64 [seq_len].
        logits: float32 [seq_len, vocabulary].
        reference: the baseline's, of the same shape; None compares the model with itself.
        threads: that share the positions.

    Returns:
        float64 [seq_len - 1, 4] = KL(baseline || model) in nats, 1 where both choose the same token, -log p(next),
        the baseline's -log p(next).
    """
    count = len(ids) - 1
    figures = np.zeros((count, 4))
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])

    def work(start: int) -> None:
        stop = min(start + step, count)
        theirs = None if reference is None else reference[start:stop]
        figures[start:stop] = _chunk_figures(ids[start + 1 : stop + 1], logits[start:stop], theirs)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(0, count, step)))
    return figures


def _chunk_figures(following: np.ndarray, logits: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    rows = np.arange(len(following))
    figures = np.empty((len(following), 4))
    with np.errstate(invalid="ignore"):  # NaN logits give NaN figures, which the caller reports
        shifted, _, log_sum, best = _normalize(logits)
        figures[:, 2] = log_sum - shifted[rows, following]
        if reference is None:
            figures[:, 0], figures[:, 1], figures[:, 3] = 0 * figures[:, 2], 1, figures[:, 2]
            return figures
        base, powers, base_log_sum, base_best = _normalize(reference)
        figures[:, 3] = base_log_sum - base[rows, following]
        figures[:, 1] = best == base_best
        # sum p (log p - log q) = sum p ((base - base_log_sum) - (shifted - log_sum)); 0 where p is 0, also where
        # both logits are -inf (masked vocabulary).
        gap = np.subtract(base, shifted, out=np.zeros_like(base), where=powers > 0)
        gap *= powers
        weighted = gap.sum(axis=-1, dtype=np.float64) / np.exp(base_log_sum)
        figures[:, 0] = weighted - base_log_sum + log_sum
        close = np.flatnonzero(figures[:, 0] < _CLOSE)
        if len(close):  # a small difference of large numbers: float64 throughout
            figures[close, 0] = kl_divergence(log_softmax(logits[close]), log_softmax(reference[close]))
    return figures


def _normalize(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return logits less their maximum, their exponentials, float64 log(sum exp), and the likeliest token."""
    best = logits.argmax(axis=-1)
    shifted = logits - np.take_along_axis(logits, best[:, None], axis=-1)
    powers = np.exp(shifted)
    return shifted, powers, np.log(powers.sum(axis=-1, dtype=np.float64)), best


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
