"""What an objective gives to the training loop, and what it is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from llmfast.tune.options import TuneOptions


_NOT_TOKENS = ("attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Defaults:
    """What suits an objective where the user says nothing."""

    learning_rate: float
    epochs: int
    batch_size: int
    seq_len: int
    layer_decay: float = 1.0


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        inputs: name -> token ids, or arrays for a module of the user's own; padded when rows are put together. `ids.0`
            and `ids.1` are those of a pair.
        target: what is expected, in whatever form the objective wants.
        items: how many things its loss is the sum of: tokens of a text, or 1.
    """

    inputs: Mapping[str, Any]
    target: Any = None
    items: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens of its inputs, padding not counted."""
        return sum(len(ids) for name, ids in self.inputs.items() if name.partition(".")[0] not in _NOT_TOKENS)


@dataclass(frozen=True)
class Job:
    """What an objective is prepared from.

    Attributes:
        source: the checkpoint's folder, or the Python file of a module.
        options: the user's, with the objective's defaults filled in.
        companions: a folder with the checkpoint's tokenizer.json and the files beside it.
    """

    source: Path
    options: "TuneOptions"
    companions: Path

    @property
    def seq_len(self) -> int:
        """Tokens of a row at most."""
        assert self.options.seq_len is not None
        return self.options.seq_len


class Objective(Protocol):
    """A model, its data and its loss."""

    model: "torch.nn.Module"
    train: Sequence[Row]
    validation: Sequence[Row]
    metric: str
    """Name of the figure that `score` returns."""

    def loss(self, model: "torch.nn.Module", rows: Sequence[Row]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the sum of the losses of all items of the rows, and a prediction for each row.

        Args:
            model: `self.model`, perhaps wrapped.
            rows: some rows.

        Returns:
            float32 scalar with a gradient; float32 [rows, ...] without.
        """

    def score(self, predictions: "np.ndarray", rows: Sequence[Row], loss: float) -> float | None:
        """Return the metric of predictions [rows, ...] whose mean loss per item is known; None when undefined."""

    def to(self, device: "torch.device") -> None:
        """Move what is not part of the model, a teacher for instance, to the device."""

    def save(self, folder: Path) -> None:
        """Write weights and config into a folder that has the companions already."""
