"""What a benchmark run can be told, and the only copy of the defaults."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmfast.errors import OptionError
from llmfast.verdict import Gate

# Rounds when none are asked for: the fewest whose range holds the median with the confidence that a verdict needs.
DEFAULT_ROUNDS = 8
# Seconds of rounds when neither --rounds nor --max-time is given.
DEFAULT_MAX_TIME_S = 60.0

# Keys of a row that compare a speed with the baseline's.
SPEED_RATIO = re.compile(r"forward_s_ratio|(tokens|.*_tokens|samples)_per_s(_\d+x\d+)?_ratio")
_SHAPE = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,6})")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?")
_MOST_VALUES = 100

Numbers = int | tuple[int, ...] | None


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """Read a comma list of numbers and ranges, as llama-bench does: `128,512`, `1-4`, `128-512+128`, `1-8*2`.

    Raises:
        OptionError: not of that form, or more than a hundred numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or (match[4] is not None and int(match[4]) < (2 if match[3] == "*" else 1)):
            raise OptionError(f"{flag}: `{part}` is no number or range", "for example 128,512 or 128-512+128 or 1-8*2")
        value, last = int(match[1]), int(match[2] or match[1])
        while value <= last:
            numbers.append(value)
            if len(numbers) > _MOST_VALUES:
                raise OptionError(f"{flag} `{text}`: more than {_MOST_VALUES} values", "ask for fewer")
            step = int(match[4] or 1)
            value = max(value + 1, value * step) if match[3] == "*" else value + step
        if last < int(match[1]):
            raise OptionError(f"{flag}: the range `{part}` ends before it begins")
    return tuple(dict.fromkeys(numbers))


def parse_shapes(text: str) -> dict[str, tuple[int, int]]:
    """Return shape as typed -> (batch, length) of a comma list such as `8x128,1x16`.

    Raises:
        OptionError: a part that is not BATCHxLENGTH.
    """
    sizes = {}
    for shape in (part.strip() for part in text.split(",")):
        match = _SHAPE.fullmatch(shape)
        if match is None:
            raise OptionError(f"--shapes: `{shape}` is not BATCHxLENGTH", "for example: 8x128,1x16")
        sizes[shape] = (int(match[1]), int(match[2]))
    return sizes


def parse_cost(text: str) -> tuple[str, float]:
    """Return label and cost of `LABEL=X`: missing a case of the label costs X times what a false alarm does.

    Raises:
        OptionError: not of that form, or X is no number above 0.
    """
    label, mark, number = text.rpartition("=")
    try:
        cost = float(number)
    except ValueError:
        cost = 0.0
    if not mark or not label or not 0 < cost < float("inf"):
        raise OptionError(f"--false-negative-cost `{text}`: not LABEL=X with X above 0", "for example fraud=10")
    return label, cost


@dataclass(frozen=True)
class BenchOptions:
    """Settings of one benchmark run. None takes a default that fits the models.

    Attributes:
        prompt_tokens: lengths of the random input; several make a sweep.
        output_tokens: tokens a text-generation model generates after it, at least 2.
        batch: sequences at once, of a decoder each in a row of one KV cache; several make a sweep.
        shapes: batch x length of the random input, a comma list: `8x128,1x16`.
        rounds: measured rounds; every bundle runs once per round. None takes 8 at least, and more until speeds are
            known to `precision` or `max_time` ends.
        max_time: seconds of rounds; given, `rounds` are the fewest.
        precision: half the width of a ratio's interval that is narrow enough; smaller differences count as none.
        warmup: rounds run and thrown away before them.
        data: a file that quality is measured on; None measures speed only.
        num_samples: windows of text that the divergence of text generation is measured on, at most.
        seq_len: tokens per window.
        context_tokens: tokens of each window that are given and not scored.
        false_negative_cost: `LABEL=X`: missing a case of the label costs X times what a false alarm does; the threshold
            of a classifier follows from it.
        provider: names in `llmfast.providers`, a comma list.
        allow_fallback: go on with the CPU where a provider is missing or took nothing.
        threads: intra-op threads; None takes the cores this process may use.
        seed: of the random token ids and of the bootstrap.
        gates: limits that every bundle but the baseline must keep.
        max_drops: further gates, `METRIC=X`: the metric is worse than the baseline's by X at most, shares in points of
            a hundred.
        inconclusive: whether a gate passes or fails when the interval of its figure includes the limit.
        price_per_hour: of the machine, in any currency.
        watts_per_core: what energy is estimated with where there is no counter.
        profile: measure time by operator too.
        tasks: of lm-eval: names of tasks, groups and tags, or patterns.
        tasks_dir: a folder of further tasks.
        limit: documents of each task, at most.
        num_fewshot: examples before each question; None takes the tasks' own numbers.
        download: fetch the data of tasks where it is not on this machine.

    Raises:
        OptionError: a value out of range, or a shape that is not `BATCHxLENGTH`.
    """

    prompt_tokens: Numbers = None
    output_tokens: int | None = None
    batch: Numbers = None
    shapes: str | None = None
    rounds: int | None = None
    max_time: float | None = None
    precision: float = 0.02
    warmup: int = 1
    data: Path | None = None
    num_samples: int = 20
    seq_len: int | None = None
    context_tokens: int = 1
    false_negative_cost: str | None = None
    provider: str = "cpu"
    allow_fallback: bool = False
    threads: Numbers = None
    seed: int = 0
    gates: tuple[Gate, ...] = ()
    max_drops: tuple[str, ...] = ()
    inconclusive: Literal["pass", "fail"] = "fail"
    price_per_hour: float | None = None
    watts_per_core: float = 3.5
    profile: bool = False
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    download: bool = False

    def __post_init__(self) -> None:
        lowest = {
            "prompt_tokens": 1,
            "output_tokens": 2,  # the time per output token is the time between two of them
            "batch": 1,
            "rounds": 1,
            "max_time": 0,
            "precision": 0,
            "warmup": 0,
            "num_samples": 1,
            "context_tokens": 1,
            "seq_len": 2,  # the first token is not scored
            "seed": 0,
            "price_per_hour": 0,
            "limit": 1,
            "num_fewshot": 0,
            "watts_per_core": 0,
        }
        for name, least in lowest.items():
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None and not least <= one < float("inf"):
                    flag = name.replace("_", "-")
                    raise OptionError(f"--{flag} {one}: must be at least {least}")
        if self.inconclusive not in ("pass", "fail"):
            raise OptionError(f"--inconclusive `{self.inconclusive}`: unknown", "choose from: pass, fail")
        if not self.tasks:
            needless = {"tasks-dir": self.tasks_dir, "limit": self.limit, "num-fewshot": self.num_fewshot}
            for flag, value in (needless | {"download": self.download or None}).items():
                if value is not None:
                    raise OptionError(f"--{flag} is for tasks of lm-eval", "name some with --tasks")
        if self.shapes is not None:
            parse_shapes(self.shapes)
        if self.false_negative_cost is not None:
            parse_cost(self.false_negative_cost)

    @property
    def fewest_rounds(self) -> int:
        """Rounds that are run whatever happens."""
        return self.rounds if self.rounds is not None else DEFAULT_ROUNDS

    @property
    def time_limit(self) -> float:
        """Seconds after which no further round begins; 0 runs the fewest rounds only."""
        if self.max_time is not None:
            return self.max_time
        return DEFAULT_MAX_TIME_S if self.rounds is None else 0.0

    @property
    def providers(self) -> tuple[str, ...]:
        """The providers to run on, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.provider.split(",")))


def numbers(value: Numbers) -> tuple[int, ...]:
    """Return one number, several or none as a tuple."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
