"""What a pruning can be told, and the only copy of the defaults."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmfast.errors import OptionError
from llmfast.quantize.calibrate import Calibration
from llmfast.verdict import Gate

ALLOCATIONS = ("uniform", "sensitivity")
_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


@dataclass(frozen=True)
class Pattern:
    """At most `keep` of `group` weights that follow one another in a row are not zero."""

    keep: int
    group: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read `N:M`.

        Raises:
            OptionError: not of that form, or nothing or everything would stay.
        """
        match = _PATTERN.fullmatch(text)
        if match is None or int(match[1]) >= int(match[2]):
            raise OptionError(f"--pattern `{text}`: not N:M with N below M", "for example 2:4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True)
class PruneOptions:
    """Choices of a pruning.

    Attributes:
        method: files in prune/structured, or one in prune/masks, separated by commas.
        ratios: method -> the share that goes of what it works on; the method "" is every other one.
        target_params: parameters to have at most, or below 1 the share of them; ratios are found for it.
        allocation: `uniform`; or `sensitivity`: shares follow from what is lost, of each layer of a graph, or of each
            of several methods on a checkpoint with `target_params`.
        pattern: of the weights that masks leave; None is anywhere.
        settings: options of the methods as typed, `KEY -> VALUE`.
        include: put masks only on layers whose name matches this regular expression.
        exclude: leave layers alone whose name matches.
        calibration: the text that methods with statistics run on.
        measure: compare the result with the original.
        data: the text to compare on; None is what the calibration leaves over, or a text that llmfast ships.
        data_samples: windows, or an encoder's lines, to compare on.
        measure_speed: export a checkpoint before and after, and time both.
        threads: intra-op threads that they are timed with; None takes the cores this process may use.
        gates: limits on the figures of the comparison.
        overwrite: replace what llmfast wrote.

    Raises:
        OptionError: a share out of range, a count that is not positive, gates without a comparison.
    """

    method: str
    ratios: Mapping[str, float] = field(default_factory=dict)
    target_params: float | None = None
    allocation: str = "uniform"
    pattern: Pattern | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    include: str = ""
    exclude: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    measure: bool = True
    data: Path | None = None
    data_samples: int = 4
    measure_speed: bool = False
    threads: int | None = None
    gates: tuple[Gate, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, ratio in self.ratios.items():
            where = f"--ratio {name}={ratio:g}" if name else f"--ratio {ratio:g}"
            if ratio >= 1:
                raise OptionError(f"{where} removes everything", "give the share that goes, from 0 to below 1")
            if not ratio >= 0:
                raise OptionError(f"{where}: not a share from 0 to below 1")
        if self.target_params is not None and not self.target_params > 0:
            raise OptionError(f"--target-params {self.target_params:g}: nothing would stay")
        if self.data_samples < 1:
            raise OptionError(f"--data-samples {self.data_samples}: must be at least 1")
        if self.allocation not in ALLOCATIONS:
            raise OptionError(f"unknown allocation `{self.allocation}`", f"choose from: {', '.join(ALLOCATIONS)}")
        if not self.measure and (self.gates or self.data):
            raise OptionError("--no-measure leaves nothing to judge", "leave out --no-measure, or --data and the gates")


def parse_ratio(text: str) -> dict[str, float]:
    """Read `0.25`, or `layers=0.1,ffn=0.3`.

    Raises:
        OptionError: not of that form.
    """
    ratios = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            ratios[name.strip()] = float(number)
        except ValueError as error:
            raise OptionError(f"--ratio `{text}`: not a share", "for example 0.25 or layers=0.1,ffn=0.3") from error
    return ratios


def parse_params(text: str) -> float:
    """Read `100M`, `1.5B`, a plain number, or a share such as `75%`.

    Raises:
        OptionError: not of that form.
    """
    match = re.fullmatch(r"(\d+\.?\d*) ?([KMB%]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(f"--target-params `{text}`: not a number of parameters", "for example 100M or 75%")
    count = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "%": 0.01}[match[2].upper()]
    if match[2] == "%" and count >= 1:
        raise OptionError(f"--target-params `{text}`: not below 100%")
    return count


def parse_factor(text: str) -> float:
    """Read `1.3x` or `1.3`.

    Raises:
        OptionError: not a factor above 1.
    """
    match = re.fullmatch(r"(\d+\.?\d*)x?", text.strip())
    if match is None or float(match[1]) <= 1:
        raise OptionError(f"--target-speedup `{text}`: not a factor above 1", "for example 1.3x")
    return float(match[1])
