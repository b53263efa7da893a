"""Regression on sentence pairs: how alike two sentences are.

Of a sentence encoder the cosine of the pair's two vectors, pooled as its files say, moves towards score / scale; of a
classifier with one label, which reads both sentences at once, that label does: its logit, or of a re-ranker the score
that `infer` gives, where that is the sigmoid of the logit. loss = mean over pairs of the squared
difference; spearman = rank correlation with the scores.
Data: lines of `score<TAB>sentence<TAB>sentence`, or the columns `score`, `sentence1` and `sentence2` of .csv, .tsv or
.jsonl.
Source: Reimers, Gurevych 2019, Sentence-BERT, https://arxiv.org/abs/1908.10084
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.bench.statistics import spearman
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.export.checkpoint import load_config
from llmfast.export.pooling import Pooling, pool, read_pooling
from llmfast.export.ranking import is_ranker, read_activation
from llmfast.records import Records
from llmfast.tokenizer import Text, Tokenizer
from llmfast.tune.objective import Defaults, Job, Row
from llmfast.tune.rows import split
from llmfast.tune.student import (
    CLASSIFIER_CLASS,
    DECODER_CLASS,
    ENCODER_CLASS,
    check_length,
    collate,
    encode,
    load_model,
    model_class,
    pad_id,
    save_model,
)

if TYPE_CHECKING:
    import torch

DEFAULTS = Defaults(learning_rate=5e-5, epochs=4, batch_size=32, seq_len=128)
Pair = tuple[float, str, str]


@dataclass(frozen=True)
class Options:
    """Options of regression.

    Attributes:
        scale: the score of equal sentences; 0 takes the highest one of the data.
    """

    scale: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise OptionError(f"scale {self.scale}: not a positive number")


def prepare(job: Job, options: Options) -> "Regression":
    """Read the pairs and load the encoder."""
    config = load_config(job.source)
    kind = model_class(config)
    reads_pairs = kind == CLASSIFIER_CLASS
    if kind == DECODER_CLASS or (reads_pairs and config.num_labels != 1):
        raise UnsupportedError(
            f"`{job.source}` gives no score: it is a `{config.architectures[0]}`"
            + (f" with {config.num_labels} labels" if reads_pairs else ""),
            "regression takes sentence encoders, and classifiers with one label",
        )
    train = _read(job.options.data, job)
    held = _read(job.options.validation, job) if job.options.validation else []
    scale = options.scale or max(score for score, _, _ in train)
    if scale <= 0:
        raise InputError(f"no score of `{job.options.data}` is above 0", "scores of like sentences are high")
    model = load_model(job.source, CLASSIFIER_CLASS if reads_pairs else ENCODER_CLASS, config)
    pooling = None if reads_pairs else read_pooling(job.source)
    if pooling and getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)  # it feeds nothing here
    settings = config.to_dict()
    has_sigmoid = is_ranker(job.source, settings) and read_activation(job.source, settings) == "sigmoid"
    check_length(model, job.seq_len)
    tokenizer, length = Tokenizer.load(job.companions), job.seq_len

    def encoded(pairs: list[Pair]) -> list[Row]:
        targets = [score / scale for score, _, _ in pairs]
        if reads_pairs:
            texts: list[Text] = [(first, second) for _, first, second in pairs]
            inputs = encode(tokenizer, texts, length, model)
        else:
            columns = [[first for _, first, _ in pairs], [second for _, _, second in pairs]]
            sides = [encode(tokenizer, column, length, model) for column in columns]
            inputs = [
                {f"{name}.{side}": ids for side, one in enumerate(both) for name, ids in one.items()}
                for both in zip(*sides, strict=True)
            ]
        return [Row(one, target) for one, target in zip(inputs, targets, strict=True)]

    rows = encoded(train)
    if job.options.validation:
        return Regression(model, rows, encoded(held), pooling, has_sigmoid)
    return Regression(model, *split(rows, job.options.validation_split, job.options.seed), pooling, has_sigmoid)


class Regression:
    """An encoder and scored pairs.

    Args:
        model: the encoder.
        train: pairs to learn from.
        validation: pairs to validate on.
        pooling: makes a vector of an encoder's tokens; None of a classifier, which reads both sentences at once.
        has_sigmoid: a classifier's score is the sigmoid of its logit.
    """

    metric = "spearman"

    def __init__(
        self,
        model: Any,
        train: Sequence[Row],
        validation: Sequence[Row],
        pooling: Pooling | None,
        has_sigmoid: bool,
    ) -> None:
        self.model = model
        self.train = train
        self.validation = validation
        self._pooling = pooling
        self._has_sigmoid = has_sigmoid
        self._device: Any = None

    def loss(self, model: Any, rows: Sequence[Row]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the summed loss, and each pair's score."""
        import torch
        from torch.nn.functional import cosine_similarity

        targets = torch.tensor([row.target for row in rows], dtype=torch.float32, device=self._device)
        padding = pad_id(self.model.config)
        if self._pooling is None:
            scores = model(**collate(rows, padding, self._device)).logits.float()[:, 0]
            scores = scores.sigmoid() if self._has_sigmoid else scores
        else:
            # Both sides in one pass: rows first, then what they are compared with.
            names = [name.removesuffix(".0") for name in rows[0].inputs if name.endswith(".0")]
            sides = [Row({name: row.inputs[f"{name}.{side}"] for name in names}) for side in (0, 1) for row in rows]
            batch = collate(sides, padding, self._device)
            vectors = pool(model(**batch).last_hidden_state.float(), batch["attention_mask"], self._pooling)
            scores = cosine_similarity(vectors[: len(rows)], vectors[len(rows) :])
        return (scores - targets).square().sum(), scores.detach()

    def score(self, predictions: np.ndarray, rows: Sequence[Row], loss: float) -> float | None:
        """Return the rank correlation."""
        return spearman(predictions.astype(np.float64), np.array([row.target for row in rows]))

    def to(self, device: "torch.device") -> None:
        """Remember where inputs go."""
        self._device = device

    def save(self, folder: Path) -> None:
        """Write the encoder."""
        save_model(self.model, folder)


def _read(path: Path, job: Job) -> list[Pair]:
    columns = ("score", "sentence1", "sentence2")
    records = Records(path, *columns, numeric=("score",), fields=job.options.fields)
    return [(float(score), first, second) for score, first, second in records]
