"""A module of one's own: rows of numbers, by the names of its inputs, and the labels of its first output.

loss = mean over labels of -log p(label) where labels are whole numbers, of the squared difference where they are not.
Data: JSON lines with a list of numbers for each input of `forward`, and `labels`: one for each position of the output,
or one for the row; -100 is no label. Lists of a batch are filled up with 0, labels with -100.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import InputError, OptionError
from llmfast.export.user_module import UserModule, explain, load_user_module
from llmfast.text import read_text
from llmfast.tune.objective import Defaults, Job, Row
from llmfast.tune.rows import split

if TYPE_CHECKING:
    import torch

DEFAULTS = Defaults(learning_rate=1e-3, epochs=10, batch_size=32, seq_len=512)
_NO_LABEL = -100


@dataclass(frozen=True)
class Options:
    """Options of a module's training.

    Attributes:
        output: the output that the labels are of; empty takes the first one.
    """

    output: str = ""


def prepare(job: Job, options: Options) -> "Tensors":
    """Run the user's file, and read the rows."""
    if job.options.module is None:
        raise OptionError("--objective tensors is for --module FILE.py:FUNCTION", "a checkpoint has other objectives")
    user = load_user_module(job.source, job.options.module.rpartition(":")[2], job.options.weights)
    with explain(job.source, "`forward` on the example inputs"):
        outputs = user.run(user.inputs)
    name = options.output or next(iter(outputs))
    if name not in outputs:
        raise OptionError(f"`{job.options.module}` has no output `{name}`", f"it has: {', '.join(outputs)}")
    train = _read(job.options.data, user)
    if job.options.validation:
        validation = _read(job.options.validation, user)
    else:
        train, validation = split(train, job.options.validation_split, job.options.seed)
    if len({isinstance(row.target.flat[0].item(), int) for row in (*train, *validation)}) > 1:
        raise InputError(f"`{job.options.data}`: labels are whole numbers in some rows and not in others")
    return Tensors(user, name, train, validation)


class Tensors:
    """A user's module and rows of numbers."""

    def __init__(self, user: UserModule, output: str, train: Sequence[Row], validation: Sequence[Row]) -> None:
        self.model = user.module
        self.train = train
        self.validation = validation
        self._user = user
        self._output = output
        self._device: Any = None
        self._are_classes = train[0].target.dtype == np.int64
        self.metric = "accuracy" if self._are_classes else "rmse"

    def loss(self, model: Any, rows: Sequence[Row]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the summed loss, and how many labels of each row are right, or its squared error."""
        import torch
        from torch.nn.functional import cross_entropy

        from llmfast.export.user_module import flatten_outputs

        batch = {
            name: torch.from_numpy(_stack([row.inputs[name] for row in rows], 0)).to(self._device, example.dtype)
            for name, example in self._user.inputs.items()
        }
        with explain(self._user.path, "`forward`"):
            result = model(**batch) if self._user.by_name else model(*batch.values())
        found = flatten_outputs(result)[self._output].float()
        targets = torch.from_numpy(_stack([row.target for row in rows], _NO_LABEL)).to(self._device)
        if self._are_classes:
            self._check_shape(found.shape[:-1], targets)
            flat = cross_entropy(found.flatten(0, -2), targets.flatten(), ignore_index=_NO_LABEL, reduction="sum")
            return flat, (found.detach().argmax(-1) == targets).reshape(len(rows), -1).sum(-1)
        found = found.squeeze(-1) if found.ndim == targets.ndim + 1 and found.shape[-1] == 1 else found
        self._check_shape(found.shape, targets)
        errors = torch.where(targets == _NO_LABEL, 0, found - targets).square().reshape(len(rows), -1).sum(-1)
        return errors.sum(), errors.detach()

    def score(self, predictions: np.ndarray, rows: Sequence[Row], loss: float) -> float | None:
        """Return the share of right labels, or the root of the mean squared error."""
        if self._are_classes:
            return float(predictions.sum() / sum(row.items for row in rows))
        return math.sqrt(loss)

    def to(self, device: "torch.device") -> None:
        """Remember where inputs go."""
        self._device = device

    def save(self, folder: Path) -> None:
        """Write the module's weights, for `export --weights`."""
        from safetensors.torch import save_model

        save_model(self.model, str(folder / "model.safetensors"))

    def _check_shape(self, shape: Sequence[int], targets: Any) -> None:
        if tuple(shape) != tuple(targets.shape):
            raise InputError(
                f"labels {list(targets.shape)} do not fit the output `{self._output}`, with room for {list(shape)}",
                "one label for each position of the output, or one for a row",
            )


def _read(path: Path, user: UserModule) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    return [_parse(path, number, line, user) for number, line in lines]


def _parse(path: Path, number: int, line: str, user: UserModule) -> Row:
    where = f"`{path}`: line {number}"
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not JSON", "each line is one object of lists") from error
    wanted = [*user.inputs, "labels"]
    missing = next((name for name in wanted if not isinstance(entry, Mapping) or name not in entry), None)
    if missing is not None:
        raise InputError(f"{where} has no `{missing}`", f"`forward` takes {', '.join(user.inputs)}; and `labels`")
    try:
        arrays = {name: np.asarray(entry[name]) for name in wanted}
        if any(array.dtype.kind not in "iufb" or array.size == 0 for array in arrays.values()):
            raise ValueError("not numbers")
    except ValueError as error:
        raise InputError(f"{where}: not lists of numbers", "nested lists have one shape") from error
    labels = arrays.pop("labels")
    labels = labels.astype(np.int64 if labels.dtype.kind in "iub" else np.float32)
    return Row(arrays, labels, max(1, int((labels != _NO_LABEL).sum())))


def _stack(arrays: Sequence[Any], value: float) -> np.ndarray:
    """Return arrays as one, filled up to the longest along their first axis."""
    longest = max(len(array) if array.ndim else 0 for array in arrays)
    if longest == 0:
        return np.stack(arrays)
    return np.stack(
        [
            np.pad(array, [(0, longest - len(array)), *[(0, 0)] * (array.ndim - 1)], constant_values=value)
            for array in arrays
        ]
    )
