"""A text becomes one vector: search, clustering, similarity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.batch_session import open_encoder
from llmfast.bundle import ModelBundle
from llmfast.tasks._embeddings import EMBEDDING_OPTIONS, answer_embeddings, spell_embedding
from llmfast.tasks._encoder import run_session, run_texts

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModel"
OUTPUTS = ("last_hidden_state", "sentence_embedding")
INFER_OPTIONS = EMBEDDING_OPTIONS


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Compute the embedding of each text, pooled as the model's manifest says.

    Args:
        bundle: the model; its tokenizer cuts texts that are longer than the model takes.
        texts: in any order.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        output: a `.npy` file that gets the embeddings, float32 [texts, hidden]; the answers then lack them.
        overwrite: replace an existing file.

    Returns:
        `text` and `embedding` (float32 [hidden]) of each text, in their order; of several texts also `cosine`,
        the similarity with the first.

    Raises:
        OptionError: an output that is no `.npy` file, or nothing to overwrite.
        OutputExistsError: the output exists.
        ResourceError: it can't be written.
    """
    session = open_encoder(bundle.model, provider, threads, is_batch=len(texts) > 1)
    return answer_embeddings(
        "text", texts, lambda: run_texts(bundle, texts, lambda batch: embed(session, batch)), output, overwrite
    )


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people: how near it is to the first of several texts, or the vector."""
    return spell_embedding(answer, "text")


def embed(session: "onnxruntime.InferenceSession", batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the embeddings of a batch.

    A graph that has no `sentence_embedding`, as other exporters write them, gets the mean over its tokens.

    Args:
        session: the graph.
        batch: `input_ids`, `attention_mask`, `token_type_ids`, int64 [batch, seq].

    Returns:
        float32 [batch, hidden].
    """
    if any(value.name == "sentence_embedding" for value in session.get_outputs()):
        return run_session(session, ["sentence_embedding"], batch)[0]
    hidden = run_session(session, ["last_hidden_state"], batch)[0]
    mask = batch["attention_mask"][..., None].astype(np.float32)
    means: np.ndarray = (hidden * mask).sum(1) / np.maximum(mask.sum(1), 1)
    return means
