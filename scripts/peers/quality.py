"""How close each contestant of `compare.py` stays to the checkpoint in float32, as `llmfast bench` measures it.

kld = mean over positions of KL(checkpoint || contestant) in nats. Logits pass through files, one window of one
contestant at a time, and are compared in parts.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from peers.contestant import Contestant

from llmfast.divergence import prediction_figures, prediction_sums
from llmfast.text import leading_windows
from llmfast.tokenizer import Tokenizer


def read_windows(checkpoint: Path, data: Path, count: int, length: int) -> list[np.ndarray]:
    """Return the first windows of a text in the checkpoint's tokens, int64 [length] each.

    Raises:
        LlmfastError: a text or tokenizer that can't be read, or too little text.
    """
    return [ids for ids, _ in leading_windows(data, Tokenizer.load(checkpoint), count, length, skipped=1)]


def measure_quality(
    contestants: Sequence[Contestant], reference: Contestant, windows: Sequence[np.ndarray], note: Callable[[str], None]
) -> None:
    """Give each contestant that runs its `quality`, or the reason in `unscored`.

    Args:
        contestants: opened, or failed.
        reference: what they are compared with; may be one of them.
        windows: int64 [n] each.
        note: takes what is being done.
    """
    sums: dict[str, list[np.ndarray]] = {one.name: [] for one in contestants}
    with tempfile.TemporaryDirectory(prefix="llmfast-peers-") as folder:
        theirs, ours = Path(folder) / "reference.npy", Path(folder) / "contestant.npy"
        for number, ids in enumerate(windows, start=1):
            note(f"quality: window {number} of {len(windows)}")
            lack = reference.failure or reference.score(ids.tolist(), theirs)
            for one in contestants:
                if one.failure is not None or one.unscored is not None:
                    continue
                if lack is not None:
                    one.unscored = f"nothing to compare with: {reference.name}: {lack}"
                    continue
                file = theirs if one is reference else ours
                if file is ours:
                    ours.unlink(missing_ok=True)
                    one.unscored = one.score(ids.tolist(), ours)
                if one.unscored is None:
                    try:
                        sums[one.name].append(compare(ids, file, theirs))
                    except ValueError as error:
                        one.unscored = str(error)
    for one in contestants:
        if one.failure is None and one.unscored is None:
            one.quality = prediction_figures(np.concatenate(sums[one.name]))


def compare(ids: np.ndarray, file: Path, reference: Path) -> np.ndarray:
    """Return `prediction_sums` of a window.

    Args:
        ids: int64 [n].
        file: the contestant's logits, float32 [n, vocabulary], as `np.save` writes them.
        reference: the same of what it is compared with.

    Raises:
        ValueError: another number of rows or tokens, or numbers that are not finite.
    """
    logits, theirs = np.load(file, mmap_mode="r"), np.load(reference, mmap_mode="r")
    if logits.shape != theirs.shape:
        raise ValueError(f"its logits are {list(logits.shape)}, the checkpoint's {list(theirs.shape)}")
    sums = prediction_sums(ids, logits, theirs)
    if not np.isfinite(sums).all():
        raise ValueError("its divergence is not a finite number")
    return sums
