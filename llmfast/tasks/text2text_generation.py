"""Answer a text with a text: T5 and others that are told in the text itself what to do."""

from collections.abc import Sequence
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.tasks._seq2seq import SEARCH_OPTIONS, answer_sources, encode_sources
from llmfast.tokenizer import Tokenizer

AUTO_MODEL = "AutoModelForSeq2SeqLM"
OUTPUTS = ("logits",)
INFER_OPTIONS = SEARCH_OPTIONS


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Answer every text as it is.

    Args:
        bundle: the model.
        texts: with whatever prefix the model expects.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        options: those of `INFER_OPTIONS` that are given.

    Returns:
        `{"text", "answer", "generated_tokens", "finish_reason"}` for each text.

    Raises:
        InputError: a text that is empty or longer than the model's positions.
    """
    sources = encode_sources(Tokenizer.load(bundle.path), texts)
    return answer_sources(bundle, texts, sources, provider, threads, settings={}, **options)


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return str(answer["answer"])
