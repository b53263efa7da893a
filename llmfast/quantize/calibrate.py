"""The text that methods calibrate on, and statistics of the activations that it makes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError
from llmfast.quantize.corpus import SHIPPED, Corpus, Sample, pick
from llmfast.report import note


@dataclass(frozen=True)
class Calibration:
    """A text and how much of it is used.

    Attributes:
        path: UTF-8 text or JSON lines, for encoders one sample a line, for encoder-decoders with its target where it
            has one, for those that hear a folder or a list of recordings; None is the set that llmfast ships.
        num_samples: windows, or lines.
        seq_len: tokens per window; an encoder's lines are cut at it.
        field: of JSON lines.
        seed: picks the samples at random; None takes the first ones.

    Raises:
        OptionError: a count that is not positive.
    """

    path: Path | None = None
    num_samples: int = 64
    seq_len: int = 512
    field: str = "text"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.seed is not None and self.seed < 0:
            raise OptionError(f"--seed {self.seed}: must be at least 0")

    @property
    def corpus(self) -> Corpus:
        """The text."""
        return Corpus(self.path or SHIPPED, self.field)

    def describe(self) -> dict[str, Any]:
        """Return what the manifest's lineage holds."""
        return {**self.corpus.describe(), "num_samples": self.num_samples, "seq_len": self.seq_len}

    def split(self, bundle: ModelBundle) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the samples to calibrate on and those left over, int64 [seq] each.

        Raises:
            InputError: no tokenizer, or too little text.
        """
        return self.divide(self.corpus.samples(bundle, self.seq_len))

    def divide(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Divide all samples of the text into those to calibrate on and those left over."""
        used, rest = pick(samples, self.num_samples, self.seed)
        if self.path and len(used) < self.num_samples:
            note(f"note: `{self.path}` holds {len(used)} samples, {self.num_samples} were asked for")
        return used, rest


@dataclass(frozen=True)
class Statistics:
    """What is known of activations `[tokens, K]`.

    Attributes:
        num_tokens: how many were seen.
        abs_max: float32 [K], the largest magnitude of each channel.
        gram: float32 [K, K], the mean of x x^T over tokens; None unless asked for.
    """

    num_tokens: int
    abs_max: np.ndarray
    gram: np.ndarray | None = None


def summarize(samples: Iterable[np.ndarray], gram: bool = False) -> Statistics:
    """Return the statistics of activations, looked at one sample after the other.

    Args:
        samples: float32 [..., K] each, at least one.
        gram: also collect the [K, K] matrix.
    """
    num_tokens = 0
    abs_max, sums = np.zeros(1, np.float32), np.zeros((1, 1), np.float32)
    for sample in samples:
        rows = sample.reshape(-1, sample.shape[-1])
        num_tokens += len(rows)
        abs_max = np.maximum(abs_max, np.abs(rows).max(0))
        if gram:
            sums = sums + rows.T @ rows
    return Statistics(num_tokens, abs_max, sums / np.float32(num_tokens) if gram else None)
