"""What a run measured, step by step: a log of JSON lines, and a picture of it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.errors import ResourceError
from llmfast.report import to_json

if TYPE_CHECKING:
    import torch

_NOT_METRICS = ("step", "epoch", "validation_loss")


class Log:
    """The log of a run.

    Args:
        path: where its lines go; None keeps them in memory only, in all processes but the first.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []

    def write(self, **line: Any) -> None:
        """Add a line; a figure that is not a number is left out, since JSON has none."""
        kept = {key: value for key, value in line.items() if value is not None and value - value == 0}
        self._lines.append(kept)
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_json(kept, indent=None) + "\n")
        except OSError as error:
            raise ResourceError(f"cannot write `{self._path}`: {error.strerror}") from error

    def forget_after(self, step: int) -> None:
        """Read the log of an interrupted run, and drop what it did after its last checkpoint."""
        if self._path is None or not self._path.is_file():
            return
        lines = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        self._path.write_text("", encoding="utf-8")
        for line in lines:
            if line["step"] <= step:
                self.write(**line)

    def describe(self) -> str:
        """Return the last figures in a line for the progress bar."""
        trained = next((line for line in reversed(self._lines) if "loss" in line), None)
        measured: dict[str, Any] = next((line for line in reversed(self._lines) if "validation_loss" in line), {})
        if trained is None:
            return "tuning"
        figures = [
            f"loss {trained['loss']:.4f}",
            f"{trained['tokens_per_s']:.0f} tokens/s",
            f"{trained['peak_memory_bytes'] / 1e9:.1f} GB",
            *(f"{name} {value:.4f}" for name, value in measured.items() if name not in _NOT_METRICS),
        ]
        return "  ".join(figures)

    def summary(self) -> dict[str, Any]:
        """Return the last loss, the mean speed, the peak memory, and the validations."""
        trained = [line for line in self._lines if "loss" in line]
        measured = [line for line in self._lines if "validation_loss" in line]
        speeds = sorted(line["tokens_per_s"] for line in trained)
        return {
            "loss": trained[-1]["loss"] if trained else None,
            "tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
            "peak_memory_bytes": trained[-1]["peak_memory_bytes"] if trained else None,
            "validations": measured,
        }


def peak_memory(device: "torch.device") -> int:
    """Return the most bytes this process has held: on the GPU if it computes there, else in main memory."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def draw(log: Path, output: Path) -> None:
    """Draw a log's loss and metric over the steps.

    Args:
        log: a file of JSON lines.
        output: an .svg file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if "loss" in line]
    measured = [line for line in lines if "validation_loss" in line]
    metrics = [name for name in (measured[-1] if measured else {}) if name not in _NOT_METRICS]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(metrics), squeeze=False)[0]
    axes[0].plot([line["step"] for line in trained], [line["loss"] for line in trained], label="training", linewidth=1)
    if measured:
        steps = [line["step"] for line in measured]
        axes[0].plot(steps, [line["validation_loss"] for line in measured], "o-", label="validation")
    axes[0].legend()
    axes[0].set(xlabel="step", ylabel="loss", title="loss")
    for place, name in zip(axes[1:], metrics, strict=True):
        kept = [line for line in measured if name in line]
        place.plot([line["step"] for line in kept], [line[name] for line in kept], "o-", color="tab:green")
        place.set(xlabel="step", title=f"validation {name}")
    for place in axes:
        place.grid(alpha=0.3)
    # The same log gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "llmfast"}):
        figure.savefig(output, metadata={"Date": None})
