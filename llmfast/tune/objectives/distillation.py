"""Distillation: a student learns to answer as its teacher does.

loss = (1 - a) * T^2 * KL(teacher || student), both softened by the temperature T, + a * the loss of the data itself
     + b * squared difference of the hidden states, relative to the teacher's, mean over layers.
a = label_weight, b = hidden_weight; the student's layer i is compared with the teacher's at the same height, if they
are as wide. A sentence encoder has no logits: in their place stands 1 - cosine of the two models' vectors.
Choose it to repair what pruning or rounding broke; the text needs no labels then.
Data: for decoders as in causal-lm, for classifiers as in classification, for sentence encoders a text a line.
Sources: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import InputError, OptionError
from llmfast.export.checkpoint import load_config
from llmfast.export.pooling import Pooling, pool, read_pooling
from llmfast.records import is_table
from llmfast.report import note
from llmfast.text import read_lines, token_windows
from llmfast.tokenizer import Tokenizer
from llmfast.tune.labels import check_labels, find_label, read_labels
from llmfast.tune.objective import Defaults, Job, Row
from llmfast.tune.rows import read_passages, split
from llmfast.tune.student import (
    CLASSIFIER_CLASS,
    DECODER_CLASS,
    ENCODER_CLASS,
    check_length,
    collate,
    encode,
    load_model,
    model_class,
    open_folder,
    pad_id,
    save_model,
)

if TYPE_CHECKING:
    import torch

DEFAULTS = Defaults(learning_rate=1e-4, epochs=3, batch_size=8, seq_len=256)


@dataclass(frozen=True)
class Options:
    """Options of distillation.

    Attributes:
        temperature: divides the logits of both.
        label_weight: share of the data's own loss: next tokens, or labels.
        hidden_weight: weight of the hidden states; 0 leaves them out.
    """

    temperature: float = 1.0
    label_weight: float = 0.0
    hidden_weight: float = 0.1

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not math.isfinite(self.temperature):
            raise OptionError(f"temperature {self.temperature}: not positive")
        if not 0 <= self.label_weight <= 1:
            raise OptionError(f"label_weight {self.label_weight}: not between 0 and 1")
        if not 0 <= self.hidden_weight < math.inf:
            raise OptionError(f"hidden_weight {self.hidden_weight}: negative")


def prepare(job: Job, options: Options) -> "Distillation":
    """Read the data and load both models."""
    if job.options.teacher is None:
        raise OptionError("--objective distillation needs a --teacher", "the checkpoint that this one was made from")
    if job.options.labels or job.options.new_head:
        raise OptionError("--labels and --new-head do not go with a teacher", "the student has the teacher's labels")
    teacher_folder = open_folder(job.options.teacher)
    config, teacher_config = load_config(job.source), load_config(teacher_folder)
    tokenizer = Tokenizer.load(job.companions)
    kind = model_class(config)
    _check_pair(job, tokenizer, teacher_folder, config, teacher_config)
    student = load_model(job.source, kind, config)
    teacher = load_model(teacher_folder, kind, teacher_config).eval().requires_grad_(False)
    check_length(student, job.seq_len)
    pooling = read_pooling(job.source) if kind == ENCODER_CLASS else None
    if pooling and getattr(student, "pooler", None) is not None:
        student.pooler.requires_grad_(False)  # it feeds nothing here
    names = [str(config.id2label[index]) for index in range(config.num_labels)] if kind == CLASSIFIER_CLASS else []
    train = _read(job.options.data, tokenizer, job, student, names)
    if job.options.validation:
        held = _read(job.options.validation, tokenizer, job, student, names)
    else:
        train, held = split(train, job.options.validation_split, job.options.seed)
    return Distillation(student, teacher, train, held, pooling, options)


class Distillation:
    """A student, its teacher, and texts."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        train: Sequence[Row],
        validation: Sequence[Row],
        pooling: Pooling | None,
        options: Options,
    ) -> None:
        self.model = student
        self.train = train
        self.validation = validation
        self._teacher = teacher
        self._pooling = pooling
        self._options = options
        self._device: Any = None
        self._is_decoder = model_class(student.config) == DECODER_CLASS
        self.metric = "cosine" if pooling else "perplexity" if self._is_decoder else "accuracy"
        widths = [model.config.hidden_size for model in (student, teacher)]
        self._compares_hidden = options.hidden_weight > 0 and widths[0] == widths[1]
        if options.hidden_weight > 0 and not self._compares_hidden:
            note(f"note: hidden states are not compared: the student's are {widths[0]} wide, the teacher's {widths[1]}")

    def loss(self, model: Any, rows: Sequence[Row]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the summed loss, and per row the loss of its tokens, its label, or its cosine with the teacher."""
        import torch

        batch = collate(rows, pad_id(self.model.config), self._device)
        extra = {"use_cache": False} if self._is_decoder else {}
        ours = model(**batch, **extra, output_hidden_states=self._compares_hidden)
        with torch.no_grad():
            theirs = self._teacher(**batch, **extra, output_hidden_states=self._compares_hidden)
        if self._pooling:
            total, predictions = self._compare_vectors(ours, theirs, batch["attention_mask"])
        else:
            total, predictions = self._compare_logits(ours.logits, theirs.logits, rows, batch)
        if self._compares_hidden:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            distances = _hidden_distances(ours.hidden_states, theirs.hidden_states, mask)
            items = distances.new_tensor([row.items for row in rows])
            total = total + self._options.hidden_weight * (distances * items).sum()
        return total, predictions.detach()

    def score(self, predictions: np.ndarray, rows: Sequence[Row], loss: float) -> float | None:
        """Return perplexity, accuracy, or the mean cosine with the teacher."""
        if self._pooling:
            return float(predictions.mean())
        if self._is_decoder:
            mean = float(np.average(predictions, weights=[row.items for row in rows]))
            return math.exp(mean) if mean < 700 else None
        return float(np.mean(predictions == np.array([row.target for row in rows])))

    def to(self, device: "torch.device") -> None:
        """Move the teacher, and remember where inputs go."""
        self._device = device
        self._teacher.to(device)

    def save(self, folder: Path) -> None:
        """Write the student."""
        save_model(self.model, folder)

    def _compare_logits(self, ours: Any, theirs: Any, rows: Sequence[Row], batch: Any) -> tuple[Any, Any]:
        import torch

        from llmfast.tune.token_losses import token_losses

        if self._is_decoder:
            ours, theirs, targets = ours[:, :-1], theirs[:, :-1], batch["input_ids"][:, 1:]
        else:
            targets = torch.tensor([row.target for row in rows], device=self._device)
        options = self._options
        total, losses = token_losses(ours, targets, theirs, options.temperature, options.label_weight)
        return total, losses.mean(-1) if self._is_decoder else ours.detach().argmax(-1)

    def _compare_vectors(self, ours: Any, theirs: Any, mask: Any) -> tuple[Any, Any]:
        from torch.nn.functional import cosine_similarity

        assert self._pooling is not None
        vectors = [pool(one.last_hidden_state.float(), mask, self._pooling) for one in (ours, theirs)]
        cosines = cosine_similarity(*vectors)
        return (1 - cosines).sum(), cosines


def _hidden_distances(ours: Sequence[Any], theirs: Sequence[Any], mask: Any) -> Any:
    """Return each row's mean distance, float32 [rows]: over its tokens, and over layers at like heights.

    A token's distance is |s - t|^2 / |t|^2, so that a few tokens of huge activations do not outweigh all others.
    """
    mask = mask.float()
    ratio = (len(theirs) - 1) / max(1, len(ours) - 1)
    total = 0
    for index, state in enumerate(ours):
        wanted = theirs[round(index * ratio)].float()
        distance = (state.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-6)
        total = total + (distance * mask).sum(-1) / mask.sum(-1)
    return total / len(ours)


def _check_pair(job: Job, tokenizer: Tokenizer, teacher: Path, config: Any, teacher_config: Any) -> None:
    """Refuse a teacher whose answers are about other things than the student's."""
    names = [(one.architectures or ["?"])[0] for one in (config, teacher_config)]
    if model_class(config) != model_class(teacher_config):
        raise InputError(
            f"`{teacher}` is a `{names[1]}`, the student `{job.source}` is a `{names[0]}`",
            "a teacher does what its student shall do",
        )
    same_size = config.vocab_size == teacher_config.vocab_size
    if not same_size or (
        (teacher / "tokenizer.json").is_file() and Tokenizer.load(teacher).vocabulary != tokenizer.vocabulary
    ):
        sizes = f"{config.vocab_size} and {teacher_config.vocab_size} tokens" if not same_size else "other tokens"
        raise InputError(
            f"student `{job.source}` and teacher `{teacher}` have different vocabularies: {sizes}",
            "distil from the model that the student was made from, or one with the same tokenizer",
        )
    widths = [one.hidden_size for one in (config, teacher_config)]
    if model_class(config) == ENCODER_CLASS and widths[0] != widths[1]:
        raise InputError(
            f"vectors of the student `{job.source}` are {widths[0]} wide, those of the teacher `{teacher}` {widths[1]}",
            "sentence encoders are compared by their vectors: take a teacher as wide",
        )
    if model_class(config) == CLASSIFIER_CLASS and config.id2label != teacher_config.id2label:
        raise InputError(
            f"student `{job.source}` and teacher `{teacher}` have different labels: "
            f"{', '.join(map(str, config.id2label.values()))}; {', '.join(map(str, teacher_config.id2label.values()))}",
            "tune the student on the teacher's labels first",
        )


def _read(path: Path, tokenizer: Tokenizer, job: Job, model: Any, names: Sequence[str]) -> list[Row]:
    length = job.seq_len
    kind = model_class(model.config)
    if kind == DECODER_CLASS:
        end = list(tokenizer.eos_ids[:1])
        passages = read_passages(path, job.options.fields)
        ids = [token for text in passages for token in (*tokenizer.encode(text), *end)]
        windows = token_windows(ids, max(1, len(ids) // length), length)
        return [Row({"input_ids": window}, items=length - 1) for window in windows.tolist()]
    if kind == CLASSIFIER_CLASS:
        records = read_labels(path, job.options.fields)
        check_labels(path, records, names, str(job.source))
        texts = [text for _, (_, text) in records]
        targets: list[int | None] = [find_label(label, names) for _, (label, _) in records]
    else:
        texts = read_passages(path, job.options.fields) if is_table(path) else read_lines(path)
        targets = [None] * len(texts)
    inputs = encode(tokenizer, texts, length, model)
    return [Row(one, target) for one, target in zip(inputs, targets, strict=True)]
