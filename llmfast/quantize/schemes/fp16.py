"""Half precision: float16 weights, widened to float32 as the model loads, or multiplied as they are.

Half the bytes on disk and in the download, and of all schemes the answers nearest to the float model's. With
compute=float32 (the default) speed and memory at run time are the float model's: no x86 CPU kernel multiplies
float16. With compute=float16 linear layers multiply in float16 between Casts, for GPUs (not measured on one). On a
CPU ONNX Runtime takes these Casts out as it loads the model, so that speed is the float model's there too, and figures
measured there are those of the rounded weights alone.
Norms, attention, softmax, residual sums, biases and the KV cache stay float32. A weight with values beyond 65504, or
whose norm lies in values too small for float16, stays float32; with compute=float16 so does a product whose inputs or
outputs come within a factor of two of 65504 on the calibration text.
Choose it to ship a model at half the size without a loss that anybody sees.
Source: Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740
"""

from dataclasses import dataclass

import numpy as np

from llmfast.errors import OptionError
from llmfast.graph.builder import GraphBuilder
from llmfast.graph.floats import FloatFormat, FloatWeight, write_float_linear, write_half_linear
from llmfast.graph.linear import Linear
from llmfast.graph.packed import QuantizedWeight, WriteLinear, write_blocks
from llmfast.quantize.workpiece import Workpiece
from llmfast.report import note, progress

FORMAT = FloatFormat("float16")
_COMPUTE = ("float32", FORMAT.name)
# Other texts than the calibration's may make larger values.
_HEADROOM = np.float32(2)


@dataclass(frozen=True)
class Options:
    """Options of half precision.

    Attributes:
        compute: the format of the products, float32 or float16.
    """

    compute: str = "float32"

    def __post_init__(self) -> None:
        if self.compute not in _COMPUTE:
            raise OptionError(f"compute `{self.compute}`: unknown", f"choose from: {', '.join(_COMPUTE)}")


def grid(options: Options) -> FloatFormat:
    """Return the format of a linear layer's weight."""
    return FORMAT


def needs_statistics(options: Options) -> bool:
    """Return whether the scheme needs a calibration text."""
    return options.compute == FORMAT.name


def make_writer(workpiece: Workpiece, options: Options) -> WriteLinear:
    """Return what adds the nodes of a linear layer."""
    unfit = _unfit_layers(workpiece) if options.compute == FORMAT.name else {}
    if unfit:
        named = ", ".join(f"{name} ({reason})" for name, reason in unfit.items())
        note(f"note: computed in float32, for {FORMAT.name} does not hold their values: {named}")

    def write(graph: GraphBuilder, linear: Linear, weight: FloatWeight | QuantizedWeight) -> None:
        if isinstance(weight, QuantizedWeight):  # one that a plan gave blocks
            write_blocks(graph, linear, weight)
        elif options.compute != FORMAT.name or linear.name in unfit or weight.grid != FORMAT:
            write_float_linear(graph, linear, weight)
        else:
            write_half_linear(graph, linear, weight)

    return write


def _unfit_layers(workpiece: Workpiece) -> dict[str, str]:
    """Return the layers with inputs or outputs that float16 does not hold on the calibration text, and why."""
    unfit = {}
    replay = workpiece.replay()
    readers: dict[str, list[Linear]] = {}
    for linear in workpiece.linears:
        readers.setdefault(linear.input, []).append(linear)
    with progress("measuring ranges", len(readers)) as advance:
        for name, linears in readers.items():
            samples = replay.until(name)
            weights = [workpiece.read(linear) for linear in linears]
            for sample in samples:
                for linear, weight in zip(linears, weights, strict=True):
                    for what, values in (("inputs", sample), ("outputs", sample @ weight.T)):
                        reason = FORMAT.unfit(values * _HEADROOM)
                        if reason:
                            unfit[linear.name] = f"{what}: {reason}"
            advance()
    return unfit
