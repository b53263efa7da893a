"""The text that methods calibrate on, and statistics of the activations that it makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import TEXT_GENERATION, ModelBundle, sha256
from llmfast.errors import InputError
from llmfast.text import read_lines, read_text, token_windows
from llmfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Calibration:
    """A text and how much of it is used.

    Attributes:
        path: UTF-8 text; for encoders one sample a line.
        num_samples: windows, or lines.
        seq_len: tokens per window; an encoder's lines are cut at it.
    """

    path: Path
    num_samples: int = 64
    seq_len: int = 512

    def describe(self) -> dict[str, Any]:
        """Return what the manifest's lineage holds."""
        return {
            "name": self.path.name,
            "sha256": sha256(self.path),
            "num_samples": self.num_samples,
            "seq_len": self.seq_len,
        }


@dataclass(frozen=True)
class Statistics:
    """What is known of activations `[tokens, K]`.

    Attributes:
        num_tokens: how many were seen.
        abs_max: float32 [K], the largest magnitude of each channel.
        gram: float32 [K, K], the mean of x x^T over tokens; None unless asked for.
        drift: float32 [K, K], the mean of (e - x) x^T, where e is what x is in the exact model; None where they
            are the same.
    """

    num_tokens: int
    abs_max: np.ndarray
    gram: np.ndarray | None = None
    drift: np.ndarray | None = None


def summarize(
    samples: Sequence[np.ndarray], gram: bool = False, exact: Sequence[np.ndarray] | None = None
) -> Statistics:
    """Return the statistics of activations.

    Args:
        samples: float32 [..., K] each.
        gram: also collect the [K, K] matrix.
        exact: the same activations in the exact model; asks for the drift.
    """
    features = samples[0].shape[-1]
    num_tokens = sum(sample.size // features for sample in samples)
    abs_max = np.zeros(features, np.float32)
    sums = np.zeros((features, features), np.float32) if gram else None
    drift = np.zeros((features, features), np.float32) if exact is not None else None
    for number, sample in enumerate(samples):
        rows = sample.reshape(-1, features)
        np.maximum(abs_max, np.abs(rows).max(0), out=abs_max)
        if sums is not None:
            sums += rows.T @ rows
        if drift is not None and exact is not None:
            drift += (exact[number].reshape(-1, features) - rows).T @ rows
    for matrix in (sums, drift):
        if matrix is not None:
            matrix /= np.float32(num_tokens)
    return Statistics(num_tokens, abs_max, sums, drift)


def calibration_samples(bundle: ModelBundle, calibration: Calibration) -> list[np.ndarray]:
    """Return token ids, int64 [seq] each."""
    tokenizer = Tokenizer.load(bundle.path)
    if bundle.manifest.task == TEXT_GENERATION:
        limit = bundle.manifest.architecture.get("context_length", calibration.seq_len)
        ids = tokenizer.encode(read_text(calibration.path))
        return list(token_windows(ids, calibration.num_samples, min(calibration.seq_len, limit)))
    length = min(bundle.longest_text(calibration.seq_len), calibration.seq_len)
    lines = read_lines(calibration.path)[: calibration.num_samples]
    if not lines:
        raise InputError(f"no line of text in `{calibration.path}`", "encoders are calibrated on one sample a line")
    return [np.array(tokenizer.encode(line)[:length], np.int64) for line in lines]
