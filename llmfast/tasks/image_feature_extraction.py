"""An image becomes one vector: search by likeness, and with CLIP by texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.batch_session import open_encoder
from llmfast.bundle import ModelBundle
from llmfast.tasks._embeddings import EMBEDDING_OPTIONS, answer_embeddings, spell_embedding
from llmfast.tasks._encoder import run_session
from llmfast.tasks._images import run_images

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModel"
OUTPUTS = ("last_hidden_state", "image_embedding")
INPUT = "pixel_values"
INFER_OPTIONS = EMBEDDING_OPTIONS
TEXT_OPTION = "image"


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Compute the embedding of each image: the class token's vector, of CLIP the projected one.

    Args:
        bundle: the model; its preprocessor_config.json says how an image becomes its input.
        texts: paths of image files.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        output: a `.npy` file that gets the embeddings, float32 [images, hidden]; the answers then lack them.
        overwrite: replace an existing file.

    Returns:
        `image` (the path) and `embedding` (float32 [hidden]) of each image, in their order; of several images also
        `cosine`, the similarity with the first.

    Raises:
        OptionError: an output that is no `.npy` file, or nothing to overwrite.
        OutputExistsError: the output exists.
        ResourceError: it can't be written.
        InputError: a file that is missing or no image, or no preprocessor_config.json.
        UnsupportedError: Pillow is not installed, or the graph is none of this task.
    """
    session = open_encoder(bundle.model, provider, threads, is_batch=len(texts) > 1)
    return answer_embeddings(
        "image", texts, lambda: run_images(bundle, texts, lambda pixels: embed(session, pixels)), output, overwrite
    )


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people: how near it is to the first of several images, or the vector."""
    return spell_embedding(answer, "image")


def embed(session: "onnxruntime.InferenceSession", pixels: np.ndarray) -> np.ndarray:
    """Compute the embeddings of images, float32 [batch, 3, height, width]: float32 [batch, hidden]."""
    return run_session(session, OUTPUTS[1:], {INPUT: pixels})[0]
