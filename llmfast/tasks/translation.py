"""Translate a text from one language to another."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError
from llmfast.tasks._languages import Languages, resolve_pair
from llmfast.tasks._seq2seq import SEARCH_OPTIONS, answer_sources, check_texts, encode_sources, task_settings
from llmfast.tokenizer import Tokenizer

AUTO_MODEL = "AutoModelForSeq2SeqLM"
OUTPUTS = ("logits",)
INFER_OPTIONS = ("source_lang", "target_lang", *SEARCH_OPTIONS)
_PREFIX = "translation_"  # of T5's settings: translation_en_to_de


def needed_options(bundle: ModelBundle) -> tuple[str, ...]:
    """Return the languages that the model has to be told of every text."""
    described = bundle.manifest.architecture.get("languages")
    if described is not None:
        return ("target_lang",) if described["source"] == "none" else ("source_lang", "target_lang")
    sources = [source for source, _ in _pairs(task_settings(bundle))]
    return ("target_lang",) if sources and all(sources.count(source) > 1 for source in sources) else ()


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Translate every text.

    How the model is told the languages depends on it: tokens (mBART, M2M-100, NLLB, multilingual OPUS-MT), words
    before the text (T5), or not at all.

    Args:
        bundle: the model.
        texts: to translate.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        source_lang: the language of the texts.
        target_lang: the language to translate to.
        options: others of `INFER_OPTIONS` that are given.

    Returns:
        `{"text", "answer", "generated_tokens", "finish_reason"}` for each text.

    Raises:
        OptionError: a language that the model does not have, or one that it needs and is not given.
        InputError: a text that is empty or longer than the model's positions.
    """
    check_texts(texts)
    tokenizer = Tokenizer.load(bundle.path)
    described = bundle.manifest.architecture.get("languages")
    settings: Mapping[str, Any]
    if described is not None:
        languages = Languages(described, tokenizer)
        sources = [languages.encode(text, source_lang, target_lang) for text in texts]
        settings = languages.settings(target_lang)
    elif pairs := _pairs(task_settings(bundle)):
        settings = pairs[resolve_pair(pairs, source_lang, target_lang)]
        sources = encode_sources(tokenizer, texts, str(settings.get("prefix", "")))
    else:
        _check_direction(bundle, source_lang, target_lang)
        settings = {}
        sources = encode_sources(tokenizer, texts)
    return answer_sources(bundle, texts, sources, provider, threads, settings=settings, **options)


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return str(answer["answer"])


def _pairs(settings: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return (source, target) -> settings of T5's `translation_en_to_de` and the like."""
    pairs = {}
    for name, values in settings.items():
        source, separator, target = name.removeprefix(_PREFIX).partition("_to_")
        if name.startswith(_PREFIX) and separator:
            pairs[source, target] = values
    return pairs


def _check_direction(bundle: ModelBundle, source_lang: str | None, target_lang: str | None) -> None:
    """Refuse languages other than the ones of a model that translates in one direction."""
    from llmfast.bundle import read_json

    path = bundle.companion("tokenizer_config.json")
    config = read_json(path) if path is not None else {}
    if not isinstance(config, dict):
        raise InputError(f"malformed settings: `{path}`: not a JSON object")
    for flag, given in (("source_lang", source_lang), ("target_lang", target_lang)):
        known = config.get(flag)
        if given is not None and given != known:
            direction = f"its {flag.replace('_', ' ')} is {known}" if known else "it does not say which"
            raise OptionError(
                f"--{flag.replace('_', '-')} {given}: `{bundle.path}` translates in one direction, and {direction}",
                "leave the languages out",
            )
