"""What the tasks of sound waves share: WAV files one by one through a session."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llmfast.audio import AudioProcessor
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.report import progress


def run_recordings(
    bundle: ModelBundle, paths: Sequence[str], compute: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Read recordings and compute an array for each, in their order.

    They run one at a time: padding would change what models without a mask hear.

    Args:
        bundle: its preprocessor_config.json says how sound becomes its input.
        paths: of WAV files.
        compute: takes float32 [1, samples], returns [1, ...].

    Raises:
        InputError: a file that is missing, of another sampling rate, too short, or with samples that are not 16 bits
            wide; or no preprocessor_config.json.
    """
    rows = []
    with progress("running", len(paths)) as advance:
        for path in paths:
            rows.append(compute(read_recording(bundle, path)[None])[0])
            advance(1)
    return rows


def read_recording(bundle: ModelBundle, path: str) -> np.ndarray:
    """Return a WAV file as the model's input, float32 [samples]; raises what `run_recordings` does."""
    values = AudioProcessor.load(bundle.path).read(Path(path))
    shortest = bundle.manifest.architecture.get("min_samples", 1)
    if len(values) < shortest:
        raise InputError(
            f"`{path}` has {len(values)} samples, the model takes {shortest} or more", "give a longer recording"
        )
    return values
