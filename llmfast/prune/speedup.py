"""`llmfast prune --target-speedup`: the smallest share of a checkpoint that makes it so much faster, measured.

Candidates are checkpoints of the pruned sizes with their first channels and blocks, for values change no time; each
is exported and timed beside the original. The share that passes is then pruned in earnest, and timed once more.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmfast.errors import GateError, OptionError
from llmfast.prune.checkpoint.files import copy_settings, save_checkpoint
from llmfast.prune.checkpoint.sizes import Shrinker
from llmfast.prune.checkpoint.speed import SpeedTest
from llmfast.prune.checkpoint.stage import open_source, prune_checkpoint
from llmfast.prune.checkpoint.workpiece import Workpiece, build_model, tensors_of
from llmfast.prune.methods import STRUCTURED, choose_methods
from llmfast.prune.options import PruneOptions
from llmfast.prune.result import Pruned
from llmfast.prune.stage import check_places
from llmfast.report import note
from llmfast.verdict import Gate

_MOST_CANDIDATES = 6
_LARGEST_RATIO = 0.9
# A candidate so much faster than asked is near enough.
_CLOSE = 1.04


def prune_to_speed(source: str, output: Path, options: PruneOptions, factor: float) -> Pruned:
    """Prune a checkpoint by as little as makes every speed `factor` times the original's.

    Returns:
        What `prune` returns, speeds measured.

    Raises:
        GateError: no share that leaves something is fast enough; nothing is written.
        OptionError: methods that make nothing faster; otherwise as of `prune`.
        OutputExistsError: the output exists.
    """
    folder, choices = choose_methods(replace(options, ratios={"": 0.0}))
    if folder != STRUCTURED:
        raise OptionError(f"{choices[0].name} makes nothing faster", "layers, ffn, heads and width do")
    check_places(source, output, folder, choices, options.overwrite)
    checkpoint, task = open_source(source)
    shrinker = Shrinker(checkpoint.config, task, source, choices)
    names = [choice.name for choice in choices if choice.plugin.TAKES_RATIO]
    with SpeedTest(checkpoint.path, task, options.threads) as test, tempfile.TemporaryDirectory() as place:
        workpiece = Workpiece(checkpoint, task, Path(place))
        tried: list[tuple[float, float]] = [(0.0, 1.0)]
        speeds: dict[str, float] = {}
        for number in range(_MOST_CANDIDATES):
            ratio = _next_ratio(tried, factor)
            if ratio is None:
                break
            try:
                config = shrinker.shrink(dict.fromkeys(names, ratio)).config
            except OptionError:
                tried.append((ratio, float("inf")))
                continue
            candidate = Path(place) / str(number)
            candidate.mkdir()
            copy_settings(checkpoint.path, candidate)
            save_checkpoint(_crop(workpiece.model, config), workpiece.dtype, candidate)
            speeds = test.measure(candidate)
            speed = min(speeds.values())
            spelled = ", ".join(f"{key.removesuffix('_ratio')} {value:.2f}x" for key, value in speeds.items())
            note(f"ratio {ratio:.1%}: {spelled}")
            tried.append((ratio, speed))
    passed = [ratio for ratio, speed in tried if factor <= speed < float("inf")]
    if not passed:
        best = max(speed for _, speed in tried if speed < float("inf"))
        raise GateError(f"no share makes `{source}` {factor:g} times as fast: {best:.2f} at most", "add another method")
    gates = (*options.gates, *(Gate(key, factor, "min") for key in speeds))
    found = replace(options, ratios=dict.fromkeys(names, min(passed)), measure_speed=True, gates=gates)
    return prune_checkpoint(source, output, choices, found)


def _next_ratio(tried: Sequence[tuple[float, float]], factor: float) -> float | None:
    """Return the share to try next: where a line through the times nearest to the wanted one reaches it.

    Args:
        tried: share and speed of each candidate; infinite where nothing would be left.
        factor: the speed asked for.
    """
    slow = max(pair for pair in tried if pair[1] < factor)
    fast = min((pair for pair in tried if pair[1] >= factor), default=(_LARGEST_RATIO, float("inf")))
    if fast[1] <= factor * _CLOSE or fast[0] - slow[0] < 0.01:
        return None
    low, high, wanted = 1 / slow[1], 1 / fast[1], 1 / factor
    ratio = slow[0] + (low - wanted) / max(low - high, 1e-9) * (fast[0] - slow[0])
    if len(tried) == 1:
        return min(1 - wanted, _LARGEST_RATIO)  # time in proportion to what is left
    margin = 0.1 * (fast[0] - slow[0])
    return min(max(ratio, slow[0] + margin), fast[0] - margin)


def _crop(model: Any, config: Any) -> Any:
    """Return a model of a smaller config with the first blocks and channels of a larger one."""
    old = tensors_of(model)

    def read(name: str, shape: tuple[int, ...]) -> Any:
        return old[name][tuple(slice(size) for size in shape)]

    return build_model(model, config, read)
