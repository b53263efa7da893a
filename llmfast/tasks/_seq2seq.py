"""What the tasks of encoder-decoders share: their options, their prefixes, and the search for targets."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmfast.bundle import ModelBundle, read_json
from llmfast.errors import InputError
from llmfast.infer.rules import read_rules
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.infer.sources import search_sources
from llmfast.tokenizer import Tokenizer

SEARCH_OPTIONS = ("num_beams", "max_tokens", "min_tokens", "length_penalty", "no_repeat_ngram_size")


def answer_sources(
    bundle: ModelBundle,
    texts: Sequence[str],
    sources: Sequence[Sequence[int]],
    provider: str,
    threads: int | None,
    *,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    settings: Mapping[str, Any],
    **options: Any,
) -> list[dict[str, Any]]:
    """Encode sources and find a target for each.

    Args:
        bundle: the model.
        texts: as the user gave them; they are part of the answers.
        sources: their tokens.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        max_tokens: most tokens of a target; None takes the model's limit.
        min_tokens: fewest.
        settings: what the task says of the search, in the words of generation_config.json.
        options: what the user says of it, in the same words; takes precedence.

    Returns:
        `{"text", "answer", "generated_tokens", "finish_reason"}` for each text.

    Raises:
        InputError: a source that is empty or longer than the model's positions.
        OptionError: a value out of range.
    """
    named = dict(settings) | {key: value for key, value in options.items() if value is not None}
    context_length = bundle.manifest.architecture.get("context_length")
    rules = read_rules(bundle.path, context_length, max_tokens, **named, min_new_tokens=min_tokens)
    tokenizer = Tokenizer.load_target(bundle.path)
    engine = Seq2SeqEngine(bundle, provider, threads)
    answers: dict[int, dict[str, Any]] = {}
    for index, found in search_sources(engine, rules, sources):
        answers[index] = {
            "text": texts[index],
            "answer": tokenizer.decode(found.ids).strip(),
            "generated_tokens": len(found.ids),
            "finish_reason": found.finish_reason,
        }
    return [answers[index] for index in range(len(sources))]


def encode_sources(tokenizer: Tokenizer, texts: Sequence[str], prefix: str = "") -> list[list[int]]:
    """Return the tokens of texts, special tokens included.

    Raises:
        InputError: a text without a visible character.
    """
    check_texts(texts)
    return [tokenizer.encode(prefix + text) for text in texts]


def check_texts(texts: Sequence[str]) -> None:
    """Refuse texts that say nothing: a model makes something up of them."""
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise InputError(f"text {number} of {len(texts)} is empty", "leave empty texts out")


def task_settings(bundle: ModelBundle) -> dict[str, dict[str, Any]]:
    """Return `task_specific_params` of config.json: task -> prefix and search settings, as T5 and BART have them."""
    config = bundle.companion("config.json")
    found = read_json(config).get("task_specific_params") if config is not None else None
    return found if isinstance(found, dict) else {}
