"""An image gets a label: what it shows, of the classes that the model knows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError
from llmfast.image import ImageProcessor
from llmfast.report import progress
from llmfast.runtime import open_session
from llmfast.tasks._encoder import label_names, label_scores, run_session

AUTO_MODEL = "AutoModelForImageClassification"
OUTPUTS = ("logits",)
INPUT = "pixel_values"
INFER_OPTIONS = ("top_k",)
TEXT_OPTION = "image"

# Images of one pass: one is hundreds of positions already.
_BATCH_SIZE = 4


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
    if top_k < 1:
        raise OptionError(f"--top-k {top_k}: must be at least 1")
    processor = ImageProcessor.load(bundle.path)
    session = open_session(bundle.model, provider, threads)
    answers = []
    with progress("running", len(texts)) as advance:
        for start in range(0, len(texts), _BATCH_SIZE):
            paths = texts[start : start + _BATCH_SIZE]
            pixels = np.stack([processor.read(Path(path)) for path in paths])
            logits = run_session(session, OUTPUTS, {INPUT: pixels})[0]
            answers += [_describe(path, row, bundle, top_k) for path, row in zip(paths, logits, strict=True)]
            advance(len(paths))
    return answers


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line a label for people."""
    return "\n".join(f"{one['label']} {one['score']:.4f}" for one in answer["labels"])


def _describe(path: str, logits: np.ndarray, bundle: ModelBundle, top_k: int) -> dict[str, Any]:
    scores = label_scores(logits, bundle)
    names = label_names(bundle, len(scores))
    best = np.argsort(-scores, kind="stable")[:top_k]
    labels = [{"label": names[index], "score": float(scores[index])} for index in best]
    return {"image": path, **labels[0], "labels": labels}
