"""Languages of translation models: the names that users type, and the tokens that tell the model."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from llmfast.errors import InputError, OptionError
from llmfast.tokenizer import Tokenizer

_LISTED = 12  # languages that a hint names


class Languages:
    """The languages of a model that is told them by tokens.

    Args:
        described: `tokens`, `source` and `target` of the manifest.
        tokenizer: of the sources.

    Raises:
        InputError: the tokenizer lacks a token that the manifest names.
    """

    def __init__(self, described: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self._tokens: Mapping[str, str] = described["tokens"]
        self._source: str = described["source"]
        self._target: str = described["target"]
        self._tokenizer = tokenizer

    def encode(self, text: str, source_lang: str | None, target_lang: str | None) -> list[int]:
        """Return the tokens of a source.

        Raises:
            OptionError: a language that is missing or unknown.
        """
        target = self._id("--target-lang", target_lang)
        if self._source == "none":
            if source_lang is not None:
                raise OptionError(f"--source-lang {source_lang}: the model finds out itself", "leave it out")
            return [target, *self._tokenizer.encode(text)]
        source = self._id("--source-lang", source_lang)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        end = self._end()
        return [source, *ids, end] if self._source == "prefix" else [*ids, end, source]

    def settings(self, target_lang: str | None) -> dict[str, int]:
        """Return the search settings that make the target's language."""
        return {} if self._target == "prefix" else {self._target: self._id("--target-lang", target_lang)}

    def _id(self, flag: str, language: str | None) -> int:
        if language is None:
            raise OptionError(f"{flag} is missing: the model translates many languages", _hint("", self._tokens))
        token = self._tokens[resolve(flag, language, self._tokens)]
        found = self._tokenizer.token_id(token)
        if found is None:
            raise InputError(f"tokenizer.json has no token `{token}`", "the tokenizer belongs to another model")
        return found

    def _end(self) -> int:
        found = self._tokenizer.token_id(self._tokenizer.special_tokens.get("eos_token", "</s>"))
        if found is None:
            raise InputError("tokenizer.json has no end token", "the tokenizer belongs to another model")
        return found


def resolve(flag: str, language: str, known: Collection[str]) -> str:
    """Return the code of a language: itself, or the one code that it begins (`de` for `de_DE`).

    Raises:
        OptionError: none, or several.
    """
    if language in known:
        return language
    begun = [code for code in known if code.partition("_")[0] == language]
    if len(begun) == 1:
        return begun[0]
    raise OptionError(f"{flag}: unknown language `{language}`", _hint(language, known))


def resolve_pair(
    pairs: Collection[tuple[str, str]], source_lang: str | None, target_lang: str | None
) -> tuple[str, str]:
    """Return the pair that was asked for; what is not said must follow from what is.

    Raises:
        OptionError: no such pair, or several.
    """
    if source_lang is not None:
        resolve("--source-lang", source_lang, {source for source, _ in pairs})
    if target_lang is not None:
        resolve("--target-lang", target_lang, {target for _, target in pairs})
    fitting = [pair for pair in pairs if source_lang in (None, pair[0]) and target_lang in (None, pair[1])]
    if len(fitting) != 1:
        raise OptionError(
            f"--source-lang and --target-lang: {'which pair?' if fitting else 'no such pair'}",
            f"choose from: {', '.join(f'{source} to {target}' for source, target in pairs)}",
        )
    return fitting[0]


def _hint(language: str, known: Collection[str]) -> str:
    alike = [code for code in known if language and code.startswith(language)]
    close = alike[:_LISTED] or get_close_matches(language, known, n=3)
    if close:
        return f"did you mean {' or '.join(f'`{code}`' for code in close)}?"
    listed = sorted(known)
    rest = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return f"choose from: {', '.join(listed[:_LISTED])}{rest}"
