"""What a quantization can be told, and the only copy of the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmfast.errors import OptionError
from llmfast.quantize.budget import Budget
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.plan import DEFAULT_ROUNDING, FLOAT_BITS, Part
from llmfast.verdict import Gate

CACHE_FORMATS = ("int8",)
# The scheme of a budget: blocks, of any width.
MIXED_SCHEME = "int4"
# What a budget chooses by itself; heads and embeddings may be kept out of it.
_OF_BUDGETS = ("block_size", "head_bits")


@dataclass(frozen=True)
class QuantizeOptions:
    """Choices of a quantization.

    Attributes:
        scheme: the number format, a file in quantize/schemes.
        method: how the numbers are found: files in quantize/transforms, then one in quantize/rounding,
            separated by commas.
        settings: options of scheme and methods as typed, `KEY -> VALUE`.
        include: quantize only layers whose name matches this regular expression.
        exclude: keep layers whose name matches.
        calibration: the text that methods with statistics run on, and that damages are measured on.
        budget: chooses each layer's bits and block size.
        sensitivity: what each layer costs, from an earlier run with a budget: its file or its bundle.
        measure: compare the result with the float model.
        data: the text to compare on; None is what the calibration leaves over, or a text that llmfast ships.
        data_samples: windows, or an encoder's lines, to compare on.
        gates: limits on the figures of the comparison.
        prefill: the number format of a decoder's second graph, which reads prompts; None writes none.
        prefill_method: how that graph's numbers are found; None smooths what has 8-bit activations, and rounds to
            nearest otherwise.
        kv: how a decoder stores its KV cache, `int8`, calibrated; None leaves it float.
        trim_vocabulary: UTF-8 text; tokens that it does not need are left out first.
        resume: go on with the layers that an interrupted run had done.
        overwrite: replace an existing bundle.

    Raises:
        OptionError: gates or a budget without a comparison, a count that is not positive, an unknown cache format, a
            setting that the budget chooses, or a second graph that can't be.
    """

    scheme: str
    method: str = DEFAULT_ROUNDING
    settings: Mapping[str, str] = field(default_factory=dict)
    include: str = ""
    exclude: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    budget: Budget | None = None
    sensitivity: Path | None = None
    measure: bool = True
    data: Path | None = None
    data_samples: int = 4
    gates: tuple[Gate, ...] = ()
    prefill: str | None = None
    prefill_method: str | None = None
    kv: str | None = None
    trim_vocabulary: Path | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.data_samples < 1:
            raise OptionError(f"--data-samples {self.data_samples}: must be at least 1")
        if self.kv not in (None, *CACHE_FORMATS):
            raise OptionError(f"unknown KV cache format `{self.kv}`", f"choose from: {', '.join(CACHE_FORMATS)}")
        if not self.measure and (self.gates or self.data or (self.budget and self.budget.max_kld)):
            raise OptionError("--no-measure leaves nothing to judge", "leave out --no-measure, or --data and the gates")
        if self.prefill == self.scheme and not self.budget:
            raise OptionError(f"--prefill {self.prefill}: that is the --scheme already", "leave --prefill out")
        if self.prefill and self.budget:
            raise OptionError(
                "--prefill does not go with a budget, which gives each layer one format", "choose a --scheme"
            )
        for typed, value in self.settings.items() if self.budget else ():
            name = typed.rpartition(".")[2].replace("-", "_")
            if name in _OF_BUDGETS and (name, value) != ("head_bits", str(FLOAT_BITS)):
                raise OptionError(
                    f"--set {typed}={value} does not go with a budget, which chooses bits and block size of each layer",
                    f"leave it out; head_bits={FLOAT_BITS} keeps embedding and head in floats",
                )
        if not self.prefill and self.prefill_method is not None:
            raise OptionError("--prefill-method needs --prefill", "e.g. --prefill int8")
        if self.sensitivity and not self.budget:
            raise OptionError("--sensitivity needs a budget", "e.g. --target-bits 5")


def is_calibrated(parts: Mapping[str, Part], options: QuantizeOptions) -> bool:
    """Return whether anything is measured on the calibration text: for a method, a budget or the KV cache."""
    return bool(options.budget or options.kv or any(part.plan.needs_calibration for part in parts.values()))
