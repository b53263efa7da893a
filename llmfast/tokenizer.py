"""tokenizer.json and the chat template, without transformers."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from llmfast.bundle import MANIFEST, read_json
from llmfast.chat_template import read_template, render_template
from llmfast.errors import InputError, ResourceError, UnsupportedError
from llmfast.kept import kept
from llmfast.tokenizer_file import explained, load_backend

# What a decoder writes for bytes that are not, or not yet, a whole character.
REPLACEMENT = "\ufffd"

Text = str | tuple[str, str]

# Characters of what a model is to answer or to classify. No context is that long, and tokenizing it takes a minute.
MAX_INPUT_CHARS = 8 << 20

# Files that say which tokens end an answer, and the section of each that does.
_EOS_PLACES = (
    ("generation_config.json", ""),
    ("config.json", ""),
    ("genai_config.json", "model"),
    (MANIFEST, "architecture"),
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back, as a model's folder says.

    Args:
        backend: the parsed tokenizer.json.
        special_tokens: `bos_token`, `eos_token`, ... -> text of the token.
        eos_ids: tokens that end an answer.
        chat_template: Jinja source, None when the model has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        eos_ids: tuple[int, ...],
        chat_template: str | None,
    ) -> None:
        # Some tokenizer.json files cut or pad every text by themselves, to a length of their training.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = special_tokens
        self.eos_ids = eos_ids
        self.chat_template = chat_template

    @classmethod
    @kept
    def load(cls, folder: Path, name: str = "tokenizer.json") -> "Tokenizer":
        """Read the tokenizer of a bundle or checkpoint.

        Args:
            folder: holds tokenizer.json and, where the model has them, tokenizer_config.json,
                special_tokens_map.json, chat_template.jinja, generation_config.json, config.json,
                genai_config.json.
            name: another file than tokenizer.json, of a target with its own vocabulary.

        Raises:
            InputError: the file is missing, or one of the files is malformed.
            ResourceError: a regular expression that can take forever.
        """
        path = folder / name
        if not path.is_file():
            raise InputError(f"no tokenizer: `{path}` is missing", f"copy {name} beside the model")
        backend = load_backend(path)
        settings = _read_settings(folder / "special_tokens_map.json")
        settings |= _read_settings(folder / "tokenizer_config.json")
        special_tokens = {name: _spell(settings[name]) for name in _SPECIAL_TOKENS if settings.get(name)}
        return cls(backend, special_tokens, _eos_ids(folder, backend, special_tokens), read_template(folder, settings))

    @classmethod
    def load_target(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer of an encoder-decoder's targets, the sources' unless their vocabularies differ."""
        name = "target_tokenizer.json"
        return cls.load(folder, name) if (folder / name).is_file() else cls.load(folder)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id; a model may have more rows than that."""
        return max(self.vocabulary.values()) + 1

    def check_fits(self, rows: int) -> None:
        """Refuse a tokenizer that makes tokens which a model has no row for.

        Added tokens beyond the rows are let pass: some models have them, and never meet them (EmbeddingGemma).

        Raises:
            InputError: the message names the highest token.
        """
        if self.vocab_size <= rows:
            return
        highest = max(self._backend.get_vocab(with_added_tokens=False).values(), default=0)
        if highest >= rows:
            raise InputError(
                f"the tokenizer makes token {highest}, the model has {rows} rows",
                "the tokenizer belongs to another model",
            )

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as it is spelled in the vocabulary, None when there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: spelled-out special tokens in it become these tokens.
            add_special_tokens: add those the model wants around every text (BOS; [CLS], [SEP]). A
                rendered chat has them already.

        Raises:
            InputError: it is not Unicode, or the tokenizer has no token for a part of it.
        """
        with explained("the tokenizer fails on this text"):
            return list(self._backend.encode(_unicode(text), add_special_tokens=add_special_tokens).ids)

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that it puts before every text: BOS or [CLS], or none."""
        with explained("the tokenizer fails on one letter"):
            encoded = self._backend.encode("a")
        tokens = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        return tuple(token for token, _ in takewhile(itemgetter(1), tokens))

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of a text, int64 [n], and where in it each token ends, int64 [n] characters."""
        encoded = self._backend.encode(_unicode(text))
        return np.array(encoded.ids, np.int64), np.array([end for _, end in encoded.offsets], np.int64)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        found: dict[str, int] = self._backend.get_vocab()
        return found

    def encode_batch(self, texts: Sequence[Text], max_length: int) -> dict[str, np.ndarray]:
        """Return the inputs of an encoder for several texts, padded on the right to the longest.

        Args:
            texts: [batch], texts or pairs of texts.
            max_length: tokens to cut a text to, special tokens included.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids`, each int64 [batch, seq].
        """
        return self.pad([windows[0] for windows in self.encode_windows(texts, max_length)])

    def encode_windows(
        self, texts: Sequence[Text], max_length: int, stride: int = 0, strategy: str = "longest_first"
    ) -> list[list[tokenizers.Encoding]]:
        """Return the windows of tokens that each text fills, in order.

        Args:
            texts: texts or pairs of texts.
            max_length: tokens of a window, special tokens included.
            stride: tokens that a window repeats of the one before, fewer where a window has no room for more.
            strategy: what of a pair is cut: `longest_first`, `only_first` or `only_second`.

        Returns:
            For each text at least one window, with `ids`, `offsets`, `word_ids` and the like.

        Raises:
            InputError: a text that is not Unicode, or a pair whose uncut part alone fills a window.
            ResourceError: a text that would take too long.
        """
        for text in texts:
            for part in (text,) if isinstance(text, str) else text:
                require_bounded(_unicode(part))
        is_pair = any(not isinstance(text, str) for text in texts)
        room = max_length - self._backend.num_special_tokens_to_add(is_pair)
        try:
            with explained(f"a text does not fit {max_length} tokens"):
                self._backend.enable_truncation(max_length, stride=max(0, min(stride, room - 1)), strategy=strategy)
                encoded = self._backend.encode_batch(list(texts))
        finally:
            self._backend.no_truncation()
        return [[first, *first.overflowing] for first in encoded]

    def pad(self, windows: Sequence[tokenizers.Encoding]) -> dict[str, np.ndarray]:
        """Return windows as the inputs of an encoder, padded on the right: name -> int64 [batch, seq]."""
        shape = (len(windows), max((len(window) for window in windows), default=0))
        batch = {
            "input_ids": np.full(shape, self._pad_id, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        for index, window in enumerate(windows):
            batch["input_ids"][index, : len(window)] = window.ids
            batch["attention_mask"][index, : len(window)] = window.attention_mask
            batch["token_type_ids"][index, : len(window)] = window.type_ids
        return batch

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token such as `mask_token`, None when the model has none."""
        token = self._backend.token_to_id(self.special_tokens.get(name, ""))
        return None if token is None else int(token)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        with explained("the tokenizer fails on these tokens"):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as the text the model was trained on.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
            add_generation_prompt: end with what begins the assistant's answer.

        Returns:
            Text to encode with `add_special_tokens=False`.

        Raises:
            UnsupportedError: the model has no chat template.
            InputError: the template is malformed, or refuses the conversation.
            ResourceError: it takes more time or memory than a template may.
        """
        if self.chat_template is None:
            raise UnsupportedError("the model has no chat template", "use the prompt as it is with --raw")
        return render_template(
            self.chat_template,
            {"messages": messages, "add_generation_prompt": add_generation_prompt, **self.special_tokens},
        )

    @cached_property
    def _pad_id(self) -> int:
        return self.special_id("pad_token") or 0


def require_bounded(text: str) -> str:
    """Return a text that a model is to run on.

    Raises:
        ResourceError: it would take too long to tokenize.
    """
    if len(text) > MAX_INPUT_CHARS:
        raise ResourceError(
            f"a text of {len(text):,} characters is too much to tokenize at once, at most {MAX_INPUT_CHARS:,}",
            "cut it into parts",
        )
    return text


class TokenStream:
    """Turn tokens into text one by one, in whole characters.

    The pieces joined are `decode` of all tokens, save for bytes at the very end that never became a
    character. Nothing is shown until it is sure: a character may need four tokens.

    Args:
        tokenizer: decodes the tokens.
        context: tokens that come before. Their text isn't returned, but some decoders drop the space
            in front of the first word, so they must see that it isn't the first.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)
        self._shown_tokens = len(self._window)
        self._shown_chars = len(tokenizer.decode(self._window))

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain, often empty or several words."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        piece = whole[self._shown_chars :]
        if piece:
            self._shown_chars = len(whole)
            if whole == text:
                self._forget()
        return piece

    def _forget(self) -> None:
        # The tokens of the last piece stay, so that the next one is not taken for the first.
        self._window = self._window[self._shown_tokens :]
        self._shown_tokens = len(self._window)
        self._shown_chars = len(self._tokenizer.decode(self._window))


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"not UTF-8 text: character {error.start}", "convert it to UTF-8") from error
    return text


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"malformed settings: `{path}`: not a JSON object")
    return document


def _spell(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> tuple[int, ...]:
    for name, section in _EOS_PLACES:
        settings: Any = _read_settings(folder / name)
        settings = settings.get(section) if section else settings
        found = settings.get("eos_token_id") if isinstance(settings, dict) else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(token) is int for token in ids):
                raise InputError(f"malformed `{folder / name}`: eos_token_id is `{found}`")
            return tuple(ids)
    token = backend.token_to_id(special_tokens.get("eos_token", ""))
    return () if token is None else (token,)
