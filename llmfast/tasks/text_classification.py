"""A text gets a label: sentiment, topic, intent, moderation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.runtime import open_session
from llmfast.tasks._encoder import label_names, label_scores, run_session, run_texts

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModelForSequenceClassification"
OUTPUTS = ("logits",)
INFER_OPTIONS = ()


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None
) -> list[dict[str, Any]]:
    """Classify each text.

    Args:
        bundle: the model; its tokenizer cuts texts that are longer than the model takes.
        texts: in any order.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.

    Returns:
        `text`, `label`, `score` (the label's) and `scores` (label -> score) of each text, in their order.
    """
    session = open_session(bundle.model, provider, threads)
    rows = run_texts(bundle, texts, lambda batch: classify(session, batch))
    return [_describe(text, label_scores(row, bundle), bundle) for text, row in zip(texts, rows, strict=True)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return f"{answer['label']} {answer['score']:.4f}"


def classify(session: "onnxruntime.InferenceSession", batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the logits of a batch.

    Args:
        session: the graph.
        batch: `input_ids`, `attention_mask`, `token_type_ids`, int64 [batch, seq].

    Returns:
        float32 [batch, classes].
    """
    return run_session(session, OUTPUTS, batch)[0]


def _describe(text: str, scores: np.ndarray, bundle: ModelBundle) -> dict[str, Any]:
    labels = label_names(bundle, len(scores))
    best = int(scores.argmax())
    named = dict(zip(labels, scores.tolist(), strict=True))
    return {"text": text, "label": labels[best], "score": float(scores[best]), "scores": named}
