"""The words of a text get labels: names of people and places, parts of speech, personal data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.batch_session import open_encoder
from llmfast.bundle import ModelBundle
from llmfast.tasks._encoder import label_names, run_windows, score_tokens, softmax, trim
from llmfast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

AUTO_MODEL = "AutoModelForTokenClassification"
OUTPUTS = ("logits",)
INFER_OPTIONS = ()

_OUTSIDE = "O"
# Of the tags of BIO, BILOU and BIOES: those that begin a span, and those that go on with one.
_BEGINS, _GOES_ON = ("B", "U", "S"), ("I", "L", "E")


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None
) -> list[dict[str, Any]]:
    """Find the labelled spans of each text.

    Neighbouring tokens of one label make a span, whose score is the mean of theirs; `B-` begins a new one.
    A text longer than the model takes is read in windows that overlap by a quarter.

    Args:
        bundle: the model.
        texts: in any order.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.

    Returns:
        `text` and `entities` of each text, in their order. An entity has `label`, `score`, `start` and `end`
        (of its characters in the text) and `word`, these characters.

    Source: `TokenClassificationPipeline` of transformers with `aggregation_strategy="simple"`.
    """
    session = open_encoder(bundle.model, provider, threads, is_batch=len(texts) > 1)
    longest = bundle.longest_text()
    windows = run_windows(
        Tokenizer.load(bundle.path),
        texts,
        lambda batch: [score_tokens(session, batch)],
        lambda window, row: _label_tokens(window, row[0], label_names(bundle, row[0].shape[-1])),
        longest,
        stride=longest // 4,
    )
    return [{"text": text, "entities": _find(text, found)} for text, found in zip(texts, windows, strict=True)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as lines for people, one per span."""
    lines = [
        f"{one['start']}-{one['end']} {one['label']} {one['score']:.4f} {one['word']}" for one in answer["entities"]
    ]
    return "\n".join(lines) or "(none)"


def _label_tokens(window: "Encoding", logits: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the spans of a window, outside ones included; logits are float32 [seq, labels]."""
    scores = softmax(logits)
    best = scores.argmax(-1)
    known = set(labels)
    spans: list[dict[str, Any]] = []
    for token, (start, end) in enumerate(window.offsets):
        if window.special_tokens_mask[token]:
            continue
        tag, name = _split(labels[best[token]], known)
        if not spans or name != spans[-1]["label"] or tag in _BEGINS:
            spans.append({"label": name, "scores": [], "start": start})
        spans[-1]["scores"].append(scores[token, best[token]])
        spans[-1]["end"] = end
    return [
        {"label": span["label"], "score": float(np.mean(span["scores"])), "start": span["start"], "end": span["end"]}
        for span in spans
        if span["label"] != _OUTSIDE
    ]


def _split(label: str, known: set[str]) -> tuple[str, str]:
    """Return tag and name of a label; one without a tag goes on with a span of its own name.

    `S-` and the like are tags only where the labels also have `B-` and `I-` of the same name.
    """
    tag, dash, name = label.partition("-")
    if dash and (tag in ("B", "I") or (tag in (*_BEGINS, *_GOES_ON) and {f"B-{name}", f"I-{name}"} <= known)):
        return tag, name
    return "I", label


def _find(text: str, windows: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the entities of a text; of those that overlap, in two windows, the longer and surer one."""
    entities: list[dict[str, Any]] = []
    for span in sorted((span for spans in windows for span in spans), key=lambda span: span["start"]):
        last = entities[-1] if entities else None
        if last is None or span["start"] >= last["end"]:
            entities.append(span)
        elif (span["end"] - span["start"], span["score"]) > (last["end"] - last["start"], last["score"]):
            entities[-1] = span
    for entity in entities:
        start, end = trim(text, entity["start"], entity["end"])
        entity |= {"start": start, "end": end, "word": text[start:end]}
    return entities
