"""What a training run can be told, and the only copy of the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmfast.errors import OptionError

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class TuneOptions:
    """Choices of a training run. None takes the objective's default, see its file.

    Attributes:
        data: what to train on.
        objective: a file in tune/objectives; None takes what suits the model.
        module: `FILE.py:FUNCTION`, in place of a checkpoint: a module of the user's own.
        weights: a .safetensors file that the module starts from; None takes what the function gives.
        settings: options of the objective as typed, `KEY -> VALUE`.
        validation: what to measure on; None holds back a part of `data`.
        validation_split: that part, picked at random; 0 measures nothing.
        fields: column of a table -> its name in the file.
        labels: names of the labels in their order; empty takes them from the model or the data.
        new_head: replace a classifier's head.
        teacher: the checkpoint to distil from.
        precision: what the forward pass computes in; weights and gradients stay float32. None takes bf16 where the
            device multiplies it, fp32 elsewhere.
        optimizer: adamw, adam or sgd (with momentum 0.9).
        learning_rate: the highest.
        schedule: how it falls afterwards.
        warmup: share of the steps in which it rises.
        layer_decay: a layer's learning rate is the next one's times this, the head's is the highest: what lies deep
            was learnt from more data, and stays.
        weight_decay: of matrices; vectors are left alone.
        average: share that a moving average of the weights keeps at a step, see tune/average.py; the average is
            validated and kept. None and 0 keep the last step's weights.
        max_grad_norm: longer gradients are scaled down to it; 0 leaves them.
        epochs: passes over the data.
        max_steps: steps of the optimizer, whatever the epochs.
        batch_size: rows of a step, over all processes and passes.
        accumulate: passes that a step's rows are split into, to save memory.
        seq_len: tokens of a row; longer texts are cut.
        gradient_checkpointing: compute activations twice rather than keep them.
        lora: rank of low-rank adapters that are trained in place of the weights, and merged at the end.
        quantize_aware: `SCHEME[:KEY=VALUE,...]`; train with weights as `quantize` would round them.
        evaluate_every: steps between validations; None is an epoch.
        patience: validations without progress before the run stops; the output is then the best one's.
        save_every: steps between checkpoints.
        log_every: steps between lines of the log.
        seed: of data order, dropout, and new weights.
        device: cpu, cuda; None takes a GPU if there is one.
        parallel: how several processes share the work: ddp, or fsdp for models larger than a card.
        threads: threads of PyTorch; None takes the cores this process may use.
        resume: go on from the last checkpoint of an interrupted run.
        overwrite: replace an existing output.

    Raises:
        OptionError: a value that can't be, or two that contradict each other.
    """

    data: Path
    objective: str | None = None
    module: str | None = None
    weights: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    validation: Path | None = None
    validation_split: float = 0.05
    fields: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    new_head: bool = False
    teacher: str | None = None
    precision: str | None = None
    optimizer: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.1
    layer_decay: float | None = None
    weight_decay: float = 0.01
    average: float | None = None
    max_grad_norm: float = 1.0
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    seq_len: int | None = None
    gradient_checkpointing: bool = False
    lora: int | None = None
    quantize_aware: str | None = None
    evaluate_every: int | None = None
    patience: int | None = None
    save_every: int = 200
    log_every: int = 10
    seed: int = 0
    device: str | None = None
    parallel: str = "ddp"
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, (None, *PRECISIONS)),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("parallel", self.parallel, PARALLEL),
            ("device", self.device, (None, "cpu", "cuda")),
        ):
            if value not in known:
                raise OptionError(f"--{name} `{value}`: unknown", f"choose from: {', '.join(filter(None, known))}")
        counts = ("epochs", "max_steps", "batch_size", "accumulate", "seq_len", "lora", "evaluate_every", "patience")
        for name in (*counts, "save_every", "log_every"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise OptionError(f"--{name.replace('_', '-')} {count}: not positive")
        for name, number, low, high in (
            ("lr", self.learning_rate, 0, 10),
            ("warmup", self.warmup, 0, 1),
            ("layer-decay", self.layer_decay, 0.1, 1),
            ("validation-split", self.validation_split, 0, 0.9),
            ("weight-decay", self.weight_decay, 0, 1),
            ("max-grad-norm", self.max_grad_norm, 0, float("inf")),
            ("average", self.average, 0, 0.9999),
        ):
            if number is not None and not low <= number <= high:
                raise OptionError(f"--{name} {number}: not between {low:g} and {high:g}")
        if self.quantize_aware and self.lora:
            raise OptionError(
                "--quantize-aware does not go with --lora: adapters are merged into weights that were not rounded",
                "leave one of the two out",
            )
        if self.parallel == "fsdp":
            for name in ("average", "lora", "quantize_aware"):
                if getattr(self, name):
                    raise OptionError(f"--{name.replace('_', '-')} does not go with --parallel fsdp", "use ddp")
            if self.precision == "fp16":
                raise OptionError("--precision fp16 does not go with --parallel fsdp", "use --precision bf16")
        if self.patience and self.validation is None and not self.validation_split:
            raise OptionError("--patience needs a validation", "give --validation FILE")
