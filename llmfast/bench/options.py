"""What a benchmark run can be told, and the only copy of the defaults."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmfast.errors import OptionError
from llmfast.verdict import Gate

# Keys of a row that compare a speed with the baseline's.
SPEED_RATIO = re.compile(r"forward_s_ratio|(tokens|.*_tokens|samples)_per_s(_\d+x\d+)?_ratio")
_SHAPE = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,6})")


def per_shape(key: str, shapes: Iterable[str]) -> list[str]:
    """Return a metric's key, once per input shape when it names one (`latency_s_{shape}`)."""
    return [key.format(shape=shape) for shape in shapes] if "{shape}" in key else [key]


@dataclass(frozen=True)
class BenchOptions:
    """Settings of one benchmark run.

    Attributes:
        prompt_tokens: length of the random prompt of a text-generation model.
        output_tokens: tokens generated after it, at least 2.
        shapes: batch x length of an encoder's random input, a comma list: `8x128,1x16`.
        rounds: measured rounds; every bundle runs once per round.
        warmup: rounds run and thrown away before them.
        data: a file that quality is measured on; None measures speed only.
        num_samples: windows of text that the divergence of text generation is measured on, at most.
        seq_len: tokens per window.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        seed: of the random token ids and of the bootstrap.
        gates: limits that every bundle but the baseline must keep.

    Raises:
        OptionError: a value out of range, or a shape that is not `BATCHxLENGTH`.
    """

    prompt_tokens: int = 512
    output_tokens: int = 128
    shapes: str = "8x128"
    rounds: int = 5
    warmup: int = 1
    data: Path | None = None
    num_samples: int = 20
    seq_len: int = 512
    provider: str = "cpu"
    threads: int | None = None
    seed: int = 0
    gates: tuple[Gate, ...] = ()

    def __post_init__(self) -> None:
        lowest = {
            "prompt_tokens": 1,
            "output_tokens": 2,  # the time per output token is the time between two of them
            "rounds": 1,
            "warmup": 0,
            "num_samples": 1,
            "seq_len": 2,  # the first token is not scored
            "seed": 0,
        }
        for name, least in lowest.items():
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise OptionError(f"--{flag} {getattr(self, name)}: must be at least {least}")
        _ = self.shape_sizes

    @property
    def shape_sizes(self) -> dict[str, tuple[int, int]]:
        """Return shape as typed -> (batch, length)."""
        sizes = {}
        for shape in (part.strip() for part in self.shapes.split(",")):
            match = _SHAPE.fullmatch(shape)
            if match is None:
                raise OptionError(f"--shapes: `{shape}` is not BATCHxLENGTH", "for example: 8x128,1x16")
            sizes[shape] = (int(match[1]), int(match[2]))
        return sizes
