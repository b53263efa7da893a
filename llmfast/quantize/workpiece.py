"""The model in the middle of a quantization: its graph, its layers, and what was done to their weights so far."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from onnx import helper, numpy_helper

from llmfast.graph.edits import Edits
from llmfast.graph.fold import FoldSite, find_fold_sites
from llmfast.graph.linear import Linear
from llmfast.graph.model import OnnxModel
from llmfast.graph.packed import Grid, QuantizedWeight
from llmfast.quantize.calibrate import Statistics, summarize
from llmfast.quantize.plan import Layers
from llmfast.quantize.replay import Replay
from llmfast.report import note, progress


class Workpiece:
    """What transforms work on.

    Args:
        model: the float graph.
        layers: which weights will be quantized, and their grids.
        samples: the graph's inputs for each sample to calibrate on; none without a calibration text.

    Attributes:
        edits: the changes to weights so far.
    """

    def __init__(self, model: OnnxModel, layers: Layers, samples: Sequence[Mapping[str, np.ndarray]] = ()) -> None:
        self.model = model
        self.layers = layers
        self.samples = samples
        self.edits = Edits(model)

    @property
    def linears(self) -> list[Linear]:
        """The layers that the scheme quantizes; heads, which get blocks of their own, are not among them."""
        layers = self.layers
        return [one for one in layers.linears if one.weight in layers.grids and one.weight not in layers.block_wise]

    def read(self, linear: Linear) -> np.ndarray:
        """Return a layer's weight as it is now, float32 [N, K]."""
        return self.edits.read(linear)

    def grid(self, linear: Linear) -> Grid:
        """Return the values a layer's codes may stand for; formats of floats, which have none, take no method."""
        grid = self.layers.grids[linear.weight]
        assert isinstance(grid, Grid)
        return grid

    def insert_linear(self, name: str, weight: np.ndarray, before: Linear, grid: Grid | None) -> None:
        """Put a linear layer in front of another one.

        Args:
            name: the new layer's.
            weight: float32 [N, K].
            before: the layer that reads its output from now on.
            grid: of the new layer; None leaves it float.
        """
        graph = self.model.proto.graph
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), f"{name}.weight"))
        self.model.initializers[f"{name}.weight"] = graph.initializer[-1]
        position = next(index for index, node in enumerate(graph.node) if node.output[0] == before.output)
        graph.node.insert(position, helper.make_node("MatMul", [before.input, f"{name}.weight"], [name], name=name))
        before.node.input[0] = name
        rows, columns = weight.shape
        linear = Linear(name, graph.node[position], f"{name}.weight", False, "", (rows, columns))
        self.edits.know(linear)
        if grid is not None:
            self.layers.linears.append(linear)
            self.layers.grids[linear.weight] = grid

    def fold_sites(self) -> list[FoldSite]:
        """Return where activations can be rescaled; says so when that is nowhere."""
        sites = find_fold_sites(self.model, self.linears)
        if not sites:
            note(f"note: `{self.model.path}`: nothing to rescale: no norm that feeds linear layers alone was found")
        return sites

    def measure(self, names: Sequence[str], gram: bool = False) -> Iterator[tuple[str, Statistics]]:
        """Yield the statistics of values of the graph as it is when this is called, in the graph's order.

        Args:
            names: the values, in that order.
            gram: also collect the [K, K] matrices.
        """
        replay = self.replay()
        with progress("calibrating", len(names)) as advance:
            for name in names:
                yield name, summarize(replay.until(name), gram)
                advance()

    def replay(self, quantized: dict[str, Callable[[], np.ndarray]] | None = None) -> Replay:
        """Return a run of the graph with the edits of this moment.

        Args:
            quantized: initializer -> a function that returns what takes its place; may grow while the run goes on.
        """
        replaced = {} if quantized is None else quantized
        replaced |= self.edits.snapshot()
        return Replay(self.model, self.samples, replaced)


class InputStatistics:
    """Gives the statistics of each layer's input, asked for in the graph's order; an earlier one starts anew.

    Args:
        workpiece: the model after its transforms.
        sequential: measure the inputs that the layers quantized so far make.
    """

    def __init__(self, workpiece: Workpiece, sequential: bool) -> None:
        self._workpiece = workpiece
        self._sequential = sequential
        self._last: tuple[str, Statistics] | None = None
        self._start()

    def _start(self) -> None:
        self._quantized: dict[str, Callable[[], np.ndarray]] = {}
        self._replay = self._workpiece.replay(self._quantized)

    def __call__(self, linear: Linear) -> Statistics:
        """Return the statistics of a layer's input: its [K, K] matrix among them."""
        name = linear.input
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        if self._replay.is_past(name):
            self._start()
        statistics = summarize(self._replay.until(name), gram=True)
        self._last = name, statistics
        return statistics

    def quantized(self, linear: Linear, weight: QuantizedWeight) -> None:
        """Let the layers after this one see its rounded weight."""
        if self._sequential:
            self._quantized[linear.weight] = lambda: linear.as_stored(weight.dequantize())
