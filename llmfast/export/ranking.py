"""What a sentence-transformers cross-encoder says of itself: that it is one, and how a logit becomes a score."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfast.bundle import read_json
from llmfast.errors import UnsupportedError
from llmfast.export.pooling import read_object

_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "identity"}


def is_ranker(source: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a classifier scores pairs of texts: a cross-encoder's files, or one nameless label.

    A model of one label that says what its problem is, or what the label means, keeps to single texts: transformers
    writes `regression` when it trains one.

    Args:
        source: the checkpoint's folder.
        config: the contents of config.json.
    """
    if _num_labels(config) != 1:
        return False
    labels = config.get("id2label") or {"0": "LABEL_0"}
    nameless = list(labels.values()) == ["LABEL_0"] and config.get("problem_type") is None
    return nameless or is_cross_encoder(source) or _stated(source, config) is not None


def is_cross_encoder(source: Path) -> bool:
    """Return whether sentence-transformers (6 and newer) wrote the folder as a cross-encoder."""
    return _settings(source).get("model_type") == "CrossEncoder"


def read_activation(source: Path, config: Mapping[str, Any]) -> str:
    """Return what makes a score of a logit: `sigmoid`, also where the checkpoint says nothing, or `identity`.

    Args:
        source: the checkpoint's folder.
        config: the contents of config.json.

    Raises:
        UnsupportedError: several labels, another function, or modules beyond the classifier.

    Source: `CrossEncoder.get_default_activation_fn` of sentence-transformers.
    """
    if (labels := _num_labels(config)) != 1:
        raise UnsupportedError(
            f"`{source}` gives {labels} scores, a re-ranker gives one", "export it with --task text-classification"
        )
    listing = source / "modules.json"
    if listing.is_file() and len(read_json(listing)) != 1:
        raise UnsupportedError(f"`{listing}` names modules beside the Transformer", "such re-rankers are not supported")
    stated = _stated(source, config)
    name = "Sigmoid" if stated is None else str(stated).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise UnsupportedError(f"activation `{stated}` of `{source}` is not supported", "known: Sigmoid, Identity")
    return _ACTIVATIONS[name]


def _stated(source: Path, config: Mapping[str, Any]) -> Any:
    """Return the activation as sentence-transformers 6, 4 and 2 write it; None when none did."""
    nested = config.get("sentence_transformers")
    return (
        _settings(source).get("activation_fn")
        or (nested.get("activation_fn") if isinstance(nested, dict) else None)
        or config.get("sbert_ce_default_activation_function")
    )


def _settings(source: Path) -> Mapping[str, Any]:
    path = source / "config_sentence_transformers.json"
    return read_object(path) if path.is_file() else {}


def _num_labels(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else 2
