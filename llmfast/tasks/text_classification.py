"""A text gets a label: sentiment, topic, intent, moderation; or a pair does: does the second follow from the first?"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.batch_session import open_encoder
from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError
from llmfast.tasks._encoder import label_names, label_scores, run_session, run_texts
from llmfast.tokenizer import Text

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModelForSequenceClassification"
OUTPUTS = ("logits",)
INFER_OPTIONS = ("text_pair",)


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    text_pair: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Classify each text, or each pair of texts.

    Args:
        bundle: the model; its tokenizer cuts texts that are longer than the model takes.
        texts: in any order.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        text_pair: the second text of each pair, the hypothesis for instance; one is for all texts.

    Returns:
        `text` (and `text_pair`), `label`, `score` (the label's) and `scores` (label -> score) of each text, in their
        order.

    Raises:
        OptionError: another number of second texts than of first ones.

    Source: `TextClassificationPipeline` of transformers.
    """
    if len(text_pair) not in (0, 1, len(texts)):
        raise OptionError(
            f"{len(text_pair)} second texts for {len(texts)} first ones",
            "give one --text-pair for each, or one for all",
        )
    inputs: list[Text] = list(texts)
    parts = [{"text": text} for text in texts]
    if text_pair:
        seconds = list(text_pair) if len(text_pair) > 1 else [*text_pair] * len(texts)
        inputs = list(zip(texts, seconds, strict=True))
        parts = [{"text": text, "text_pair": second} for text, second in zip(texts, seconds, strict=True)]
    session = open_encoder(bundle.model, provider, threads, is_batch=len(texts) > 1)
    rows = run_texts(bundle, inputs, lambda batch: classify(session, batch))
    return [part | _describe(label_scores(row, bundle), bundle) for part, row in zip(parts, rows, strict=True)]


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


def _describe(scores: np.ndarray, bundle: ModelBundle) -> dict[str, Any]:
    labels = label_names(bundle, len(scores))
    best = int(scores.argmax())
    named = dict(zip(labels, scores.tolist(), strict=True))
    return {"label": labels[best], "score": float(scores[best]), "scores": named}
