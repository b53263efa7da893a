"""Changes to weights that are made as they are read, so that no second copy of a model is needed."""

from collections.abc import Callable

import numpy as np

from llmfast.graph.linear import Linear, find_linears
from llmfast.graph.model import OnnxModel

Change = Callable[[np.ndarray], np.ndarray]


class Edits:
    """What transforms do to the initializers of a model, in the order they did it.

    A layer's weight is given to a change as `[N, K]`, however it is stored; anything else as it is.
    """

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._linears = {linear.weight: linear for linear in find_linears(model)}
        self._changes: dict[str, list[Change]] = {}

    def add(self, name: str, change: Change) -> None:
        """Change an initializer when it is read, after what was added before."""
        self._changes.setdefault(name, []).append(change)

    def know(self, linear: Linear) -> None:
        """Learn of a layer that was put into the graph."""
        self._linears[linear.weight] = linear

    def read(self, linear: Linear) -> np.ndarray:
        """Return a layer's weight, float32 [N, K], with its changes."""
        return self._apply(linear.weight, linear.read(self._model))

    def read_stored(self, name: str) -> np.ndarray:
        """Return an initializer as the graph stores it, with its changes."""
        linear = self._linears.get(name)
        if linear is None or name not in self._changes:
            return self._apply(name, self._model.read(self._model.initializers[name]))
        return linear.as_stored(self.read(linear))

    def snapshot(self) -> dict[str, Callable[[], np.ndarray]]:
        """Return what reads each initializer changed so far, as the graph stores it; later changes don't show."""
        other = Edits(self._model)
        other._changes = {name: list(changes) for name, changes in self._changes.items()}

        def reader(name: str) -> Callable[[], np.ndarray]:
            return lambda: other.read_stored(name)

        return {name: reader(name) for name in self._changes}

    def _apply(self, name: str, array: np.ndarray) -> np.ndarray:
        for change in self._changes.get(name, ()):
            array = change(array)
        return array
