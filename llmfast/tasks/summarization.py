"""Say in short what a text says."""

from collections.abc import Sequence
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.tasks._seq2seq import SEARCH_OPTIONS, answer_sources, encode_sources, task_settings
from llmfast.tokenizer import Tokenizer

AUTO_MODEL = "AutoModelForSeq2SeqLM"
OUTPUTS = ("logits",)
INFER_OPTIONS = SEARCH_OPTIONS


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Summarize every text; prefix and search are those of the model's config for this task.

    Args:
        bundle: the model.
        texts: to summarize.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        options: those of `INFER_OPTIONS` that are given.

    Returns:
        `{"text", "answer", "generated_tokens", "finish_reason"}` for each text.

    Raises:
        InputError: a text that is empty or longer than the model's positions.
    """
    settings = task_settings(bundle).get("summarization", {})
    sources = encode_sources(Tokenizer.load(bundle.path), texts, settings.get("prefix", ""))
    return answer_sources(bundle, texts, sources, provider, threads, settings=settings, **options)


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return str(answer["answer"])
