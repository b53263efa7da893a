"""Documents get the order in which they answer a query: the second, finer stage of search."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.batch_session import open_encoder
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.tasks._encoder import run_session, run_texts, sigmoid

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModelForSequenceClassification"
OUTPUTS = ("logits",)
TEXT_OPTION = "document"
INFER_OPTIONS = ("query", "top_k")


def needed_options(_: ModelBundle) -> tuple[str, ...]:
    """Return the options that no text can be answered without."""
    return ("query",)


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    query: str = "",
    top_k: int = 0,
) -> list[dict[str, Any]]:
    """Rank documents by how well they answer a query.

    Args:
        bundle: a cross-encoder, which reads query and document together.
        texts: the documents, in any order; a pair that is longer than the model takes is cut, the longer text first.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        query: what is searched.
        top_k: how many of the best to return; 0 is all.

    Returns:
        `text`, `index` (its place among the texts, from 0) and `score`, the best first.

    Raises:
        OptionError: no query, or top_k below 0.
        InputError: no document, or an empty one.

    Source: `CrossEncoder.rank` of sentence-transformers.
    """
    if top_k < 0:
        raise OptionError(f"--top-k {top_k}: must be 0 (all) or more")
    if not query.strip():
        raise OptionError("no query", "give --query TEXT, and --document TEXT for each document or --input FILE")
    empty = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if empty:
        raise InputError(f"document {empty[0]} of {len(texts)} is empty", "leave empty documents out")
    session = open_encoder(bundle.model, provider, threads, is_batch=len(texts) > 1)
    logits = run_texts(bundle, [(query, text) for text in texts], lambda batch: score_pairs(session, batch)[:, None])
    score = sigmoid if bundle.manifest.architecture.get("activation", "sigmoid") == "sigmoid" else np.asarray
    # By the logits: where sigmoids round to 1, they still differ.
    order = sorted(range(len(texts)), key=lambda index: -float(logits[index][0]))
    return [
        {"text": texts[index], "index": index, "score": float(score(logits[index])[0])}
        for index in order[: top_k or None]
    ]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return f"{answer['score']:.4f} {answer['text']}"


def score_pairs(session: "onnxruntime.InferenceSession", batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the logit of each pair of a batch.

    Args:
        session: the graph.
        batch: `input_ids`, `attention_mask`, `token_type_ids`, int64 [batch, seq], of query and document.

    Returns:
        float32 [batch].

    Raises:
        UnsupportedError: the graph gives each pair several scores.
    """
    logits = run_session(session, OUTPUTS, batch)[0]
    if logits.shape[1:] != (1,):
        raise UnsupportedError(f"not a re-ranker: it gives {logits.shape[-1]} scores, not one")
    scores: np.ndarray = logits[:, 0]
    return scores
