"""A text becomes one vector: search, clustering, similarity."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.runtime import open_session
from llmfast.tasks._encoder import run_session, run_texts

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModel"
OUTPUTS = ("last_hidden_state", "sentence_embedding")
INFER_OPTIONS = ()


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None
) -> list[dict[str, Any]]:
    """Compute the embedding of each text, pooled as the model's manifest says.

    Args:
        bundle: the model; its tokenizer cuts texts that are longer than the model takes.
        texts: in any order.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.

    Returns:
        `text` and `embedding` of each text, in their order.
    """
    session = open_session(bundle.model, provider, threads)
    vectors = run_texts(bundle, texts, lambda batch: embed(session, batch))
    return [{"text": text, "embedding": vector.tolist()} for text, vector in zip(texts, vectors, strict=True)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return " ".join(f"{value:.6f}" for value in answer["embedding"])


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
        return run_session(session, "sentence_embedding", batch)
    hidden = run_session(session, "last_hidden_state", batch)
    mask = batch["attention_mask"][..., None].astype(np.float32)
    means: np.ndarray = (hidden * mask).sum(1) / np.maximum(mask.sum(1), 1)
    return means
