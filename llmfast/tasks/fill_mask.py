"""A text with a gap gets the words that fill it: what BERT and its kin are trained on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.batch_session import open_encoder
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.tasks._encoder import run_windows, score_tokens, softmax
from llmfast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

AUTO_MODEL = "AutoModelForMaskedLM"
OUTPUTS = ("logits",)
INFER_OPTIONS = ("top_k",)

# Rows of one pass: each has a logit for every token of the vocabulary at every position.
_BATCH_SIZE = 4


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None, top_k: int = 5
) -> list[dict[str, Any]]:
    """Find the likeliest tokens for the gaps of each text.

    Args:
        bundle: the model.
        texts: each with the model's mask token where a word is missing, once or more.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        top_k: how many tokens.

    Returns:
        `text` and `masks` of each text, in their order. A mask is a list of candidates, the likeliest first: `token`,
        `token_id`, `score`, and `sequence`, the text with the gap filled. Several gaps are filled each on its own.

    Raises:
        OptionError: top_k below 1.
        InputError: a text without a gap, or with one beyond what the model takes.
        UnsupportedError: the tokenizer has no mask token.

    Source: `FillMaskPipeline` of transformers.
    """
    if top_k < 1:
        raise OptionError(f"--top-k {top_k}: must be at least 1")
    tokenizer = Tokenizer.load(bundle.path)
    mask_id = tokenizer.special_id("mask_token")
    if mask_id is None:
        raise UnsupportedError(f"the tokenizer of `{bundle.path}` has no mask token", "it can't say where a gap is")
    mask, longest = tokenizer.special_tokens["mask_token"], bundle.longest_text()
    for number, text in enumerate(texts, start=1):
        if mask not in text:
            raise InputError(f"no `{mask}` in text {number} of {len(texts)}", f"write {mask} where a word is missing")
    session = open_encoder(bundle.model, provider, threads, is_batch=len(texts) > 1)
    found = run_windows(
        tokenizer,
        texts,
        lambda batch: [score_tokens(session, batch)],
        lambda window, row: _fill(tokenizer, window, row[0], mask_id, top_k),
        longest,
        batch_size=_BATCH_SIZE,
    )
    for number, (text, (masks,)) in enumerate(zip(texts, found, strict=True), start=1):
        if len(masks) < text.count(mask):
            raise InputError(
                f"a `{mask}` of text {number} of {len(texts)} lies beyond the {longest} tokens that the model takes",
                "give a shorter text",
            )
    return [{"text": text, "masks": masks} for text, (masks,) in zip(texts, found, strict=True)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as lines for people, one per candidate."""
    several = len(answer["masks"]) > 1
    return "\n".join(
        f"{f'gap {number}: ' if several else ''}{candidate['score']:.4f} {candidate['token'].strip()}"
        for number, candidates in enumerate(answer["masks"], start=1)
        for candidate in candidates
    )


def _fill(
    tokenizer: Tokenizer, window: "Encoding", logits: np.ndarray, mask_id: int, top_k: int
) -> list[list[dict[str, Any]]]:
    """Return the candidates for every gap of a window; logits are float32 [seq, vocabulary]."""
    ids = np.array(window.ids)
    is_text = np.array(window.special_tokens_mask) == 0  # not what the tokenizer put around the text
    gaps = np.flatnonzero(ids == mask_id)
    masks = []
    for gap in gaps:
        scores = softmax(logits[gap])
        candidates = []
        # A model may have more rows than its tokenizer has tokens: those say nothing.
        for token in np.argsort(-scores[: tokenizer.vocab_size], kind="stable")[:top_k].tolist():
            filled = ids.copy()
            filled[gap] = token
            candidates.append(
                {
                    "token": tokenizer.decode([token], skip_special_tokens=False),
                    "token_id": token,
                    "score": float(scores[token]),
                    # The other gaps are special tokens, and stay.
                    "sequence": tokenizer.decode(filled[is_text].tolist(), skip_special_tokens=len(gaps) == 1),
                }
            )
        masks.append(candidates)
    return masks
