"""What the tasks of images share: files in batches, one pass through a session."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.image import ImageProcessor
from llmfast.report import progress

# Images of one pass: one is hundreds of positions already.
_BATCH_SIZE = 4


def run_images(
    bundle: ModelBundle, paths: Sequence[str], compute: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Read images and compute one row for each, in their order.

    Args:
        bundle: its preprocessor_config.json says how an image becomes its input.
        paths: of image files.
        compute: takes float32 [batch, 3, height, width], returns [batch, any].

    Raises:
        InputError: a file that is missing or no image, or no preprocessor_config.json.
        UnsupportedError: Pillow is not installed.
    """
    processor = ImageProcessor.load(bundle.path)
    rows: list[np.ndarray] = []
    with progress("running", len(paths)) as advance:
        for start in range(0, len(paths), _BATCH_SIZE):
            chosen = paths[start : start + _BATCH_SIZE]
            rows += list(compute(np.stack([processor.read(Path(path)) for path in chosen])))
            advance(len(chosen))
    return rows
