"""Classification: a text gets one label of several.

loss = mean over texts of -log p(label); accuracy = share of texts whose most likely label is the given one.
With consistency c > 0 every text is answered twice, under two draws of dropout: the loss is the mean of both, plus c
times the mean of KL(p || q) and KL(q || p) of the two answers (R-Drop). It costs twice the time, and helps where data
are few. Source: Liang et al. 2021, https://arxiv.org/abs/2106.14448
Data: lines of `label text`, or the columns `label` and `text` of .csv, .tsv or .jsonl. A classifier keeps its head; a
model without one, a sentence encoder for instance, gets a new one with the labels of the data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import OptionError, UnsupportedError
from llmfast.export.checkpoint import load_config
from llmfast.report import note
from llmfast.tokenizer import Tokenizer
from llmfast.tune.labels import Labelled, check_labels, find_label, label_names, read_labels
from llmfast.tune.objective import Defaults, Job, Row
from llmfast.tune.rows import split
from llmfast.tune.student import (
    CLASSIFIER_CLASS,
    DECODER_CLASS,
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

_PROBLEM = "single_label_classification"
DEFAULTS = Defaults(learning_rate=1e-4, epochs=5, batch_size=16, seq_len=128, layer_decay=0.8)


@dataclass(frozen=True)
class Options:
    """Options of classification.

    Attributes:
        label_smoothing: share of the target that is spread over all labels.
        consistency: weight of the difference between two answers; 0 answers once.
    """

    label_smoothing: float = 0.1
    consistency: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise OptionError(f"label_smoothing {self.label_smoothing}: not from 0 to below 1")
        if not 0 <= self.consistency < math.inf:
            raise OptionError(f"consistency {self.consistency}: negative")


def prepare(job: Job, options: Options) -> "Classification":
    """Read the texts, settle the labels, and load the classifier."""
    config = load_config(job.source)
    if model_class(config) == DECODER_CLASS:
        raise UnsupportedError(
            f"`{job.source}` is a decoder, and export knows no classifier made of one", "take an encoder"
        )
    data, validation = job.options.data, job.options.validation
    train = read_labels(data, job.options.fields)
    held = read_labels(validation, job.options.fields) if validation else []
    own = [str(config.id2label[index]) for index in range(config.num_labels)]
    has_head = model_class(config) == CLASSIFIER_CLASS and not job.options.new_head
    names = list(job.options.labels) or (own if has_head else label_names(data, train))
    if has_head and len(names) != len(own):
        raise OptionError(
            f"--labels names {len(names)} labels, the head of `{job.source}` has {len(own)}",
            "--new-head replaces the head",
        )
    owner = str(job.source) if has_head else ""
    check_labels(data, train, names, owner)
    if validation:
        check_labels(validation, held, names, owner)
    if not has_head:
        config.num_labels = len(names)
    elif config.problem_type not in (None, _PROBLEM):
        note(f"note: `{job.source}` is made for {config.problem_type}; tuned, it gives a text one label of its labels")
    config.problem_type = _PROBLEM
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    model = load_model(job.source, CLASSIFIER_CLASS, config, new_head=not has_head)
    check_length(model, job.seq_len)

    def encoded(records: list[Labelled]) -> list[Row]:
        texts = [text for _, (_, text) in records]
        inputs = encode(Tokenizer.load(job.companions), texts, job.seq_len, model)
        targets = [find_label(label, names) for _, (label, _) in records]
        return [Row(one, target) for one, target in zip(inputs, targets, strict=True)]

    rows = encoded(train)
    if validation:
        return Classification(model, rows, encoded(held), options)
    return Classification(model, *split(rows, job.options.validation_split, job.options.seed), options)


class Classification:
    """A classifier and labelled texts."""

    metric = "accuracy"

    def __init__(self, model: Any, train: Sequence[Row], validation: Sequence[Row], options: Options) -> None:
        self.model = model
        self.train = train
        self.validation = validation
        self._options = options
        self._device: Any = None

    def loss(self, model: Any, rows: Sequence[Row]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the summed loss, and each text's most likely label."""
        import torch
        from torch.nn.functional import cross_entropy

        consistency = self._options.consistency if model.training else 0.0
        smoothing = self._options.label_smoothing if model.training else 0.0
        twice = [*rows, *rows] if consistency else rows
        logits = model(**collate(twice, pad_id(self.model.config), self._device)).logits.float()
        targets = torch.tensor([row.target for row in twice], device=self._device)
        total = cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        if consistency:
            first, second = logits.log_softmax(-1).chunk(2)
            total = (total + consistency * ((first.exp() - second.exp()) * (first - second)).sum()) / 2
        return total, logits[: len(rows)].detach().argmax(-1)

    def score(self, predictions: np.ndarray, rows: Sequence[Row], loss: float) -> float | None:
        """Return the accuracy."""
        return float(np.mean(predictions == np.array([row.target for row in rows])))

    def to(self, device: "torch.device") -> None:
        """Remember where inputs go."""
        self._device = device

    def save(self, folder: Path) -> None:
        """Write the classifier, the names of its labels in config.json."""
        save_model(self.model, folder)
