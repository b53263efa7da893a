"""Leaving tokens out of a tokenizer: which ones a corpus needs, and tokenizer.json without the others.

The corpus is encoded exactly as before. For BPE that takes more than its tokens: each merge that leads to one of
them is kept, with its parts. Special tokens and the alphabet stay, so any other text can still be encoded, into
smaller pieces.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.errors import UnsupportedError

_CONTINUATION = "##"  # WordPiece's mark of a piece inside a word


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that stay.

    Attributes:
        kept: int64 [new size], the old id of each new one, ascending.
        coverage: estimated share of the tokens of further text of the same kind that stay, by Good and Turing: one
            minus the share of the corpus's tokens that occur only once.
            (Good 1953, https://doi.org/10.1093/biomet/40.3-4.237)
    """

    kept: np.ndarray
    coverage: float

    def new_id(self, old: int) -> int | None:
        """Return a token's new id, None when it is left out."""
        index = int(np.searchsorted(self.kept, old))
        return index if index < len(self.kept) and self.kept[index] == old else None


def choose_tokens(document: Mapping[str, Any], ids: Iterable[int], rows: int) -> Vocabulary:
    """Choose the tokens that a corpus needs.

    Args:
        document: the contents of tokenizer.json.
        ids: the corpus, encoded.
        rows: rows of the model's embedding; ids beyond them are no tokens of the model.

    Raises:
        UnsupportedError: a kind of tokenizer that can't be cut.
    """
    counts = Counter(ids)
    tokens = _tokens(document)
    needed = {index for index in counts if index in tokens}
    needed |= {entry["id"] for entry in document.get("added_tokens", [])}
    bytes_suffice = bool(document["model"].get("byte_fallback"))
    needed |= {index for index, token in tokens.items() if _is_byte(token) or (not bytes_suffice and _is_letter(token))}
    if isinstance(document["model"].get("unk_id"), int):
        needed.add(document["model"]["unk_id"])
    id_of = {token: index for index, token in tokens.items()}
    if document["model"].get("unk_token") in id_of:
        needed.add(id_of[document["model"]["unk_token"]])
    if document["model"]["type"] == "BPE":
        needed |= _parts(document["model"]["merges"], needed, id_of)
    total = sum(counts.values())
    once = sum(count == 1 for count in counts.values())
    kept = np.array(sorted(index for index in needed if index < rows), np.int64)
    return Vocabulary(kept, 1 - once / max(total, 1))


def trim_tokenizer(document: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return tokenizer.json with the kept tokens only, under their new ids.

    Raises:
        UnsupportedError: a token that the tokenizer puts around texts was left out.
    """
    trimmed = copy.deepcopy(dict(document))
    model = trimmed["model"]
    renumbered = {old: new for new, old in enumerate(vocabulary.kept.tolist())}
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in renumbered if old < len(model["vocab"])]
        model["unk_id"] = renumbered.get(model.get("unk_id"))
    else:
        model["vocab"] = {token: renumbered[old] for token, old in model["vocab"].items() if old in renumbered}
    if model["type"] == "BPE":
        known = model["vocab"]
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(part in known for part in _pair(merge)) and "".join(_pair(merge)) in known
        ]
    added = [entry for entry in trimmed.get("added_tokens", []) if entry["id"] in renumbered]
    trimmed["added_tokens"] = [entry | {"id": renumbered[entry["id"]]} for entry in added]
    if trimmed.get("post_processor") is not None:
        _renumber_processor(trimmed["post_processor"], renumbered)
    return trimmed


def trim_settings(settings: Any, vocabulary: Vocabulary) -> Any:
    """Return config.json or generation_config.json with new token ids, and the new size of the vocabulary.

    Raises:
        UnsupportedError: a token that the settings name was left out.
    """
    if isinstance(settings, list):
        return [trim_settings(entry, vocabulary) for entry in settings]
    if not isinstance(settings, dict):
        return settings
    return {key: _renumber_setting(key, value, vocabulary) for key, value in settings.items()}


def _renumber_setting(key: str, value: Any, vocabulary: Vocabulary) -> Any:
    if key == "vocab_size" and isinstance(value, int):
        return len(vocabulary.kept)
    if not key.endswith(("token_id", "token_ids")):
        return trim_settings(value, vocabulary)
    if isinstance(value, list):
        return [_renumber_setting(key, entry, vocabulary) for entry in value]
    if type(value) is not int or value < 0:
        return value
    new = vocabulary.new_id(value)
    if new is None:
        raise UnsupportedError(
            f"token {value}, the {key} of the model's settings, is not among the special tokens of its tokenizer"
        )
    return new


def _tokens(document: Mapping[str, Any]) -> dict[int, str]:
    model = document["model"]
    if model.get("type") == "BPE" and model.get("continuing_subword_prefix"):
        raise UnsupportedError("a BPE tokenizer with a prefix inside words can't be trimmed")
    if model.get("type") == "Unigram":
        tokens = {index: piece for index, (piece, _) in enumerate(model["vocab"])}
    elif model.get("type") in ("BPE", "WordPiece"):
        tokens = {index: token for token, index in model["vocab"].items()}
    else:
        raise UnsupportedError(
            f"a tokenizer of type {model.get('type')} can't be trimmed", "BPE, WordPiece, Unigram can"
        )
    return tokens | {entry["id"]: entry["content"] for entry in document.get("added_tokens", [])}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _is_letter(token: str) -> bool:
    """Return whether a token is a single character; a byte-level tokenizer spells each byte as one."""
    return len(token.removeprefix(_CONTINUATION)) == 1


def _parts(merges: list[Any], needed: set[int], id_of: Mapping[str, int]) -> set[int]:
    """Return the tokens that the needed ones are merged from, whichever merge makes them."""
    makers: dict[str, list[tuple[str, str]]] = {}
    for merge in merges:
        left, right = _pair(merge)
        makers.setdefault(left + right, []).append((left, right))
    token_of = {index: token for token, index in id_of.items()}
    found = set(needed)
    waiting = [token_of[index] for index in needed]
    while waiting:
        for pair in makers.get(waiting.pop(), []):
            for part in pair:
                if id_of[part] not in found:
                    found.add(id_of[part])
                    waiting.append(part)
    return found


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
    return left, right


def _renumber_processor(processor: dict[str, Any], renumbered: Mapping[int, int]) -> None:
    def new_id(old: int) -> int:
        if old not in renumbered:
            raise UnsupportedError(
                f"token {old}, which the tokenizer puts around texts, is no special token that the model has a row for"
            )
        return renumbered[old]

    for inner in processor.get("processors", []):
        _renumber_processor(inner, renumbered)
    if processor["type"] == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            entry["ids"] = [new_id(old) for old in entry["ids"]]
    for name in ("sep", "cls"):  # BertProcessing and RobertaProcessing
        if isinstance(processor.get(name), list):
            processor[name][1] = new_id(processor[name][1])
