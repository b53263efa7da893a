"""An image gets a label: what it shows, of the classes that the model knows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.batch_session import open_encoder
from llmfast.bundle import ModelBundle
from llmfast.image import ImageProcessor
from llmfast.tasks._encoder import run_session
from llmfast.tasks._images import run_images
from llmfast.tasks._labels import check_top_k, rank_labels, spell_labels

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModelForImageClassification"
OUTPUTS = ("logits",)
INPUT = "pixel_values"
INFER_OPTIONS = ("top_k",)
TEXT_OPTION = "image"


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None, top_k: int = 5
) -> list[dict[str, Any]]:
    """Classify each image.

    Args:
        bundle: the model; its preprocessor_config.json says how an image becomes its input.
        texts: paths of image files.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        top_k: how many labels, at most.

    Returns:
        `image` (the path), `label`, `score` (the label's) and `labels` of each image, in their order: the likeliest
        labels, best first, each `label` and `score`.

    Raises:
        OptionError: top_k below 1.
        InputError: a file that is missing or no image, or no preprocessor_config.json.
        UnsupportedError: Pillow is not installed, or the graph is none of this task.

    Source: `ImageClassificationPipeline` of transformers.
    """
    check_top_k(top_k)
    session = open_encoder(bundle.model, provider, threads, is_batch=len(texts) > 1)
    rows = run_images(bundle, texts, lambda pixels: classify(session, {INPUT: pixels}))
    return [{"image": path} | rank_labels(row, bundle, top_k) for path, row in zip(texts, rows, strict=True)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line a label for people."""
    return spell_labels(answer)


def classify(session: "onnxruntime.InferenceSession", batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the logits of images, float32 [batch, 3, height, width] by the input's name: float32 [batch, classes]."""
    return run_session(session, OUTPUTS, batch)[0]


def read_input(bundle: ModelBundle, path: str) -> dict[str, np.ndarray]:
    """Return the graph's input for an image file, a batch of one."""
    return {INPUT: ImageProcessor.load(bundle.path).read(Path(path))[None]}
