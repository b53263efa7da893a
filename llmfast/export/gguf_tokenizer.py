"""The tokenizer of a GGUF file, rebuilt from its metadata as tokenizer.json.

Metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer. What a file leaves open is
decided as llama.cpp does: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.errors import InputError, UnsupportedError
from llmfast.export.gguf_splits import SPLITS, Split

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # types of tokens; 1 is an ordinary one
_SPACE = "\u2581"  # SentencePiece writes it for a space
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
_END_KEYS = ("eos", "eot", "eom")
# Files often name one end token of several; these end an answer wherever they are in the vocabulary.
_END_TOKENS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "</s>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
)


class GgufTokenizer:
    """Vocabulary, rules and roles of tokens.

    Args:
        path: names the file in messages.
        metadata: of the file.

    Attributes:
        backend: the tokenizer.
        special_tokens: `bos_token`, `eos_token`, ... -> text of the token.
        end_ids: tokens that end an answer, the file's `eos` first.
        chat_templates: name -> Jinja source; the usual one is `default`.
        has_default_split: the file does not say how text is split, so llama.cpp's default was taken.

    Raises:
        InputError: no tokenizer, or a malformed one.
        UnsupportedError: a tokenizer model or pre-tokenizer that is not known.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path, self._metadata = path, metadata
        self._model = str(metadata.get("tokenizer.ggml.model", ""))
        self._tokens = self._read_tokens()
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        if len(self._ids) < len(self._tokens):
            raise InputError(f"malformed tokenizer in `{path}`: a token is there twice")
        self._types = self._numbers("token_type", np.ones(len(self._tokens), np.int32))
        self._roles = {role: self._token_id(key) for role, key in _ROLES.items()}
        if self._model == "llama":
            defaults = {"unk": 0, "bos": 1, "eos": 2}
            self._roles |= {role: default for role, default in defaults.items() if self._roles[role] is None}
        self.special_tokens = {
            f"{role}_token": self._tokens[index] for role, index in self._roles.items() if index is not None
        }
        self.end_ids = self._find_end_ids()
        self.chat_templates = self._read_chat_templates()
        self.has_default_split = self._model == "gpt2" and "tokenizer.ggml.pre" not in metadata
        try:
            self.backend = self._build()
            self._add_tokens()
            self._add_surroundings()
        except (InputError, UnsupportedError):
            raise
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise InputError(f"malformed tokenizer in `{path}`: {str(error)[:200]}") from error

    def write(self, folder: Path, context_length: int) -> None:
        """Write tokenizer.json, tokenizer_config.json, generation_config.json and the chat template."""
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_templates.keys() - {"default"}:
            settings["chat_template"] = [
                {"name": name, "template": template} for name, template in self.chat_templates.items()
            ]
        elif self.chat_templates:
            (folder / "chat_template.jinja").write_text(self.chat_templates["default"], encoding="utf-8")
        generation = {
            "bos_token_id": self._roles["bos"],
            "eos_token_id": self.end_ids,
            "pad_token_id": self._roles["pad"],
        }
        for name, document in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
            known = {key: value for key, value in document.items() if value not in (None, [])}
            (folder / name).write_text(json.dumps(known, indent=2), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def role_id(self, role: str) -> int | None:
        """Return the id of `bos`, `eos`, `unk`, `pad`, `sep` or `mask`; None when the model has none."""
        return self._roles[role]

    def _read_tokens(self) -> list[str]:
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise InputError(f"no tokenizer in `{self._path}`", "choose a GGUF file that has one")
        return [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]

    def _numbers(self, key: str, default: np.ndarray) -> np.ndarray:
        values = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(values, np.ndarray) or len(values) < len(self._tokens):
            raise InputError(f"malformed tokenizer in `{self._path}`: `{key}` is shorter than the vocabulary")
        return values[: len(self._tokens)]

    def _token_id(self, key: str) -> int | None:
        index = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        # Converters write -1, or 4294967295, for none.
        return index if isinstance(index, int) and 0 <= index < len(self._tokens) else None

    def _find_end_ids(self) -> list[int]:
        named = [self._roles["eos"], *(self._token_id(key) for key in _END_KEYS)]
        # An ordinary token may be spelled as one: in Qwen2 `</s>` is HTML.
        spelled = (self._ids.get(token) for token in _END_TOKENS)
        marked = (index for index in spelled if index is not None and self._types[index] in (_CONTROL, _USER_DEFINED))
        found = [index for index in (*named, *marked) if index is not None]
        ends = {self._tokens[index]: index for index in found}
        # In these vocabularies one of them has another meaning.
        if {"<|return|>", "<|call|>"} <= ends.keys():
            ends.pop("<|end|>", None)
        if "<|tool_response>" in ends:
            ends.pop("</s>", None)
        return list(ends.values())

    def _read_chat_templates(self) -> dict[str, str]:
        prefix = "tokenizer.chat_template"
        found = {"default": self._metadata.get(prefix)} | {
            key.removeprefix(f"{prefix}."): value
            for key, value in self._metadata.items()
            if key.startswith(f"{prefix}.")
        }
        return {name: value for name, value in found.items() if isinstance(value, str)}

    def _build(self) -> Any:
        if self._model == "gpt2":
            return self._build_byte_level()
        if self._model == "llama":
            return self._build_sentencepiece(_merges_by_score(self._tokens, self._types, self._scores()))
        if self._model == "gemma4":
            return self._build_sentencepiece(self._merges())
        raise UnsupportedError(
            f"tokenizer model `{self._model:.80}` in `{self._path}` is not supported", "supported: gpt2, llama, gemma4"
        )

    def _split(self) -> Split:
        name = str(self._metadata.get("tokenizer.ggml.pre", "default"))
        if name not in SPLITS:
            raise UnsupportedError(
                f"pre-tokenizer `{name:.80}` in `{self._path}` is not supported",
                "export the Hugging Face folder of the model instead",
            )
        return SPLITS[name]

    def _build_byte_level(self) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        split = self._split()
        vocabulary = models.BPE(self._ids, self._merges(), ignore_merges=split.ignore_merges)
        tokenizer = Tokenizer(vocabulary)
        pieces = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces, by_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _build_sentencepiece(self, merges: list[tuple[str, str]]) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers

        vocabulary = models.BPE(
            self._ids, merges, unk_token=self.special_tokens.get("unk_token"), fuse_unk=True, byte_fallback=True
        )
        tokenizer = Tokenizer(vocabulary)
        prefixed = self._flag("add_space_prefix", self._model == "llama")
        normal: list[Any] = []
        if self._flag("remove_extra_whitespaces", False):
            normal += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if prefixed:
            normal.append(normalizers.Prepend(" "))
        tokenizer.normalizer = normalizers.Sequence([*normal, normalizers.Replace(" ", _SPACE)])
        steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
        return tokenizer

    def _merges(self) -> list[tuple[str, str]]:
        merges = self._metadata.get("tokenizer.ggml.merges")
        if not isinstance(merges, list):
            raise InputError(f"no merges in the tokenizer of `{self._path}`", "choose a GGUF file that has them")
        # The first part may itself be a space.
        return [(merge[: (at := merge.find(" ", 1))], merge[at + 1 :]) for merge in merges]

    def _scores(self) -> np.ndarray:
        return self._numbers("scores", np.zeros(len(self._tokens), np.float32))

    def _flag(self, key: str, default: bool) -> bool:
        return bool(self._metadata.get(f"tokenizer.ggml.{key}", default))

    def _add_tokens(self) -> None:
        from tokenizers import AddedToken

        ends = set(self.end_ids)
        # Phi-3's own tokenizer drops what follows a control token; only the model's name tells in a file.
        name = str(self._metadata.get("general.name", "")).lower()
        phi3 = self._model == "llama" and ("phi-3" in name or "phi3" in name)
        keeps_space = ("<unk>", "<s>", "<|endoftext|>")
        self.backend.add_tokens(
            [
                AddedToken(
                    token,
                    special=kind != _USER_DEFINED or index in ends,
                    normalized=False,
                    rstrip=phi3 and token not in keeps_space,
                )
                for index, (token, kind) in enumerate(zip(self._tokens, self._types.tolist(), strict=True))
                if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
            ]
        )

    def _add_surroundings(self) -> None:
        from tokenizers import processors

        bos, eos = self._roles["bos"], self._roles["eos"]
        default = self._model == "llama" or (self._model == "gpt2" and self._split().add_bos)
        before = [bos] if bos is not None and (self._flag("add_bos_token", default) or self._model == "gemma4") else []
        after = [eos] if eos is not None and self._flag("add_eos_token", False) else []
        if not before and not after:
            return
        around = [self._tokens[index] for index in before], [self._tokens[index] for index in after]
        first, second = ([*around[0], f"${letter}", *around[1]] for letter in "AB")
        self.backend.post_processor = processors.TemplateProcessing(
            single=first,
            pair=[*first, *(f"{part}:1" for part in second)],
            special_tokens=[(self._tokens[index], index) for index in {*before, *after}],
        )


def _merges_by_score(tokens: Sequence[str], types: np.ndarray, scores: np.ndarray) -> list[tuple[str, str]]:
    """Return the merges that give what SentencePiece's BPE finds by the scores of pieces.

    SentencePiece joins the neighbours whose union has the highest score, the leftmost first among equals; a list of
    merges ranks pairs instead, so the pairs of a better piece come first. The order of the pairs of one piece
    changes nothing: the merges before always leave the piece as the same two parts, wherever it is in a text.
    Pieces of the same score, which training never makes, rank by their ids.
    """
    parts = {token for token, kind in zip(tokens, types.tolist(), strict=True) if kind != _CONTROL}
    joined = np.flatnonzero(~np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)))
    order = joined[np.argsort(-scores[joined], kind="stable")]
    return [pair for index in order.tolist() for pair in _cuts(tokens[index]) if pair[0] in parts and pair[1] in parts]


def _cuts(piece: str) -> Iterator[tuple[str, str]]:
    return ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
