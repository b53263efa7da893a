"""A moving average of the weights, which answers better than the last step's where the loss is noisy.

After each step: average = d * average + (1 - d) * weights, with d = min(decay, (1 + steps) / (10 + steps)), so that the
weights that training started from are soon forgotten. The optimizer goes on from the weights; the average is what is
validated and kept.
Source: Polyak, Juditsky 1992, https://doi.org/10.1137/0330046
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Average:
    """The average of some parameters.

    Args:
        parameters: those that are trained, float32; the average starts from them.
        decay: its share after a step, from 0 to below 1.
    """

    def __init__(self, parameters: "Sequence[torch.nn.Parameter]", decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.restart()

    def restart(self) -> None:
        """Forget all steps: the average is what the parameters are now."""
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._steps = 0

    def update(self) -> None:
        """Take in the weights of a step."""
        import torch

        self._steps += 1
        share = 1 - min(self._decay, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            torch._foreach_lerp_(self._values, list(self._parameters), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average while the body runs."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def adopt(self) -> None:
        """Give the model the average for good."""
        self._exchange()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"values": [value.cpu() for value in self._values], "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self._steps = state["steps"]
        for value, kept in zip(self._values, state["values"], strict=True):
            value.copy_(kept)

    def _exchange(self) -> None:
        # Storages change places: nothing is copied, and the optimizer's parameters stay the same objects.
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._values[index] = self._values[index], parameter.data
