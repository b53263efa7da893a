"""What classifiers of images and sound share: the likeliest labels of each, best first."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError
from llmfast.tasks._encoder import label_names, label_scores


def check_top_k(top_k: int) -> None:
    """Refuse to give less than one label."""
    if top_k < 1:
        raise OptionError(f"--top-k {top_k}: must be at least 1")


def rank_labels(logits: np.ndarray, bundle: ModelBundle, top_k: int) -> dict[str, Any]:
    """Return `label` and `score` of the likeliest, and `labels`: at most top_k, best first, each with both.

    Args:
        logits: float32 [classes].
        bundle: its manifest names the labels.
        top_k: how many labels, at most.
    """
    scores = label_scores(logits, bundle)
    return best_labels(scores, label_names(bundle, len(scores)), top_k)


def best_labels(scores: np.ndarray, names: Sequence[str], top_k: int) -> dict[str, Any]:
    """Return what `rank_labels` does, of scores float64 [labels]."""
    best = np.argsort(-scores, kind="stable")[:top_k]
    labels = [{"label": names[index], "score": float(scores[index])} for index in best]
    return {**labels[0], "labels": labels}


def spell_labels(answer: dict[str, Any]) -> str:
    """Return an answer as a line a label for people."""
    return "\n".join(f"{one['label']} {one['score']:.4f}" for one in answer["labels"])
