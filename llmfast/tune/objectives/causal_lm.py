"""Causal language modelling: every token of a text is predicted from those before it.

loss = mean over tokens of -log p(token | tokens before it), in nats; perplexity = exp(loss).
Data: UTF-8 text, or the column `text` of .jsonl, .csv or .tsv, whose passages are joined by the end token. The tokens
are cut into windows that follow one another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import UnsupportedError
from llmfast.export.checkpoint import load_config
from llmfast.text import token_windows
from llmfast.tokenizer import Tokenizer
from llmfast.tune.objective import Defaults, Job, Row
from llmfast.tune.rows import read_passages, split
from llmfast.tune.student import DECODER_CLASS, check_length, load_model, model_class, save_model

if TYPE_CHECKING:
    import torch

DEFAULTS = Defaults(learning_rate=5e-5, epochs=3, batch_size=8, seq_len=256)


@dataclass(frozen=True)
class Options:
    """Causal language modelling has no options."""


def prepare(job: Job, options: Options) -> "CausalLm":
    """Read the windows and load the decoder."""
    config = load_config(job.source)
    if model_class(config) != DECODER_CLASS:
        raise UnsupportedError(
            f"`{job.source}` is a `{(config.architectures or ['?'])[0]}`, which does not predict the next token",
            "for an encoder, --objective classification or regression",
        )
    tokenizer = Tokenizer.load(job.companions)
    train = _read(job.options.data, tokenizer, job)
    if job.options.validation:
        validation = _read(job.options.validation, tokenizer, job)
    else:
        train, validation = split(train, job.options.validation_split, job.options.seed)
    model = load_model(job.source, DECODER_CLASS, config)
    check_length(model, job.seq_len)
    return CausalLm(model, train, validation)


class CausalLm:
    """A decoder and windows of a text."""

    metric = "perplexity"

    def __init__(self, model: Any, train: Sequence[Row], validation: Sequence[Row]) -> None:
        self.model = model
        self.train = train
        self.validation = validation
        self._device: Any = None

    def loss(self, model: Any, rows: Sequence[Row]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the summed loss of the rows' tokens but the first; there is nothing to predict for a row."""
        import torch

        from llmfast.tune.token_losses import token_losses

        # Windows are full, so there is no padding and no mask.
        ids = torch.tensor([row.inputs["input_ids"] for row in rows], device=self._device)
        total, losses = token_losses(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
        return total, losses.new_zeros(len(rows))

    def score(self, predictions: np.ndarray, rows: Sequence[Row], loss: float) -> float | None:
        """Return the perplexity; None where it is beyond all numbers."""
        return math.exp(loss) if loss < 700 else None

    def to(self, device: "torch.device") -> None:
        """Remember where inputs go."""
        self._device = device

    def save(self, folder: Path) -> None:
        """Write the decoder."""
        save_model(self.model, folder)


def _read(path: Path, tokenizer: Tokenizer, job: Job) -> list[Row]:
    end = list(tokenizer.eos_ids[:1])
    passages = read_passages(path, job.options.fields)
    ids = [token for text in passages for token in (*tokenizer.encode(text), *end)]
    windows = token_windows(ids, max(1, len(ids) // job.seq_len), job.seq_len)
    return [Row({"input_ids": window}, items=job.seq_len - 1) for window in windows.tolist()]
