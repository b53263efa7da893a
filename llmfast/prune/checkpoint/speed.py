"""What a pruned checkpoint's speed is: both are exported, and timed side by side."""

import tempfile
from pathlib import Path
from typing import Any

from llmfast.bench.options import SPEED_RATIO, BenchOptions
from llmfast.bench.stage import bench
from llmfast.bundle import ModelBundle
from llmfast.export.stage import ExportOptions, export

_ROUNDS = 5
_PROMPT_TOKENS, _OUTPUT_TOKENS = 256, 32


class SpeedTest:
    """Times checkpoints against the original.

    Args:
        source: the original, which is exported once.
        task: what it is for.
        threads: None takes the cores this process may use.
    """

    def __init__(self, source: Path, task: str, threads: int | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmfast-prune-")
        self._options = ExportOptions(task=task, threads=threads)
        self._before = export(str(source), self._place / "before", self._options)
        self._count = 0

    @property
    def _place(self) -> Path:
        return Path(self._folder.name)

    def __enter__(self) -> "SpeedTest":
        return self

    def __exit__(self, *_: Any) -> None:
        self._folder.cleanup()

    def measure(self, checkpoint: Path) -> dict[str, float]:
        """Export a checkpoint, and return each speed as a ratio to the original's."""
        self._count += 1
        after = export(str(checkpoint), self._place / f"after{self._count}", self._options)
        _, row = bench([self._before.path, after.path], self._settings(self._before)).rows
        return {key: value for key, value in row.figures.items() if SPEED_RATIO.fullmatch(key) and value}

    def _settings(self, bundle: ModelBundle) -> BenchOptions:
        room = int(bundle.manifest.architecture.get("context_length", _PROMPT_TOKENS + _OUTPUT_TOKENS))
        length = min(128, bundle.longest_text())
        return BenchOptions(
            prompt_tokens=max(1, min(_PROMPT_TOKENS, room - _OUTPUT_TOKENS)),
            output_tokens=_OUTPUT_TOKENS,
            shapes=f"1x{min(32, length)},8x{length}",
            rounds=_ROUNDS,
            threads=self._options.threads,
        )
