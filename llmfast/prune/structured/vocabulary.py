"""Tokens that a text does not need go: embedding, head, tokenizer and settings keep the others, under new numbers.

The text is that of `--calibration`, all of it, and has to be named. It is encoded as before, and so is a
conversation in the model's template; any other text is spelled in smaller pieces. The logits of the tokens that stay
are those of before.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.bundle import read_json
from llmfast.errors import InputError, OptionError
from llmfast.prune.checkpoint.families import Family
from llmfast.prune.checkpoint.workpiece import Workpiece
from llmfast.quantize.vocabulary import corpus_ids, write_json
from llmfast.report import note
from llmfast.vocabulary import choose_tokens, trim_settings, trim_tokenizer

TAKES_RATIO = False
_TOKENIZER = "tokenizer.json"
# Forms of the tokenizer that `transformers` would prefer or fall back to; they have the old numbers.
_STALE = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Options:
    """Trimming a vocabulary has no options."""


def resize(config: Any, family: Family, ratio: float, options: Options) -> dict[str, Any]:
    """Return no changes: they follow from the text."""
    return {}


def prune(workpiece: Workpiece, changes: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Leave tokens out of the model, and out of the tokenizer in the new checkpoint's folder."""
    folder, corpus = workpiece.folder, workpiece.corpus
    if corpus is None:
        raise OptionError("vocabulary needs the text whose tokens stay", "name it with --calibration FILE")
    if not (folder / _TOKENIZER).is_file():
        raise InputError("the vocabulary is trimmed by its tokenizer.json, which this checkpoint lacks")
    rows = int(workpiece.config.vocab_size)
    document = read_json(folder / _TOKENIZER)
    vocabulary = choose_tokens(document, corpus_ids(folder, corpus), rows)
    config = json.loads(workpiece.config.to_json_string(use_diff=False))
    trimmed = trim_settings(config, vocabulary)
    workpiece.cut(
        {key: value for key, value in trimmed.items() if value != config[key]},
        lambda name, dim: np.asarray(vocabulary.kept) if dim == 0 else None,
    )
    settings = folder / "generation_config.json"
    if settings.is_file():
        write_json(settings, trim_settings(read_json(settings), vocabulary))
    write_json(folder / _TOKENIZER, trim_tokenizer(document, vocabulary))
    for name in _STALE:
        (folder / name).unlink(missing_ok=True)
    note(
        f"vocabulary: {len(vocabulary.kept):,} of {rows:,} tokens stay; of further text like `{corpus}` about "
        f"{vocabulary.coverage:.1%} of the tokens are among them, the rest is spelled in smaller pieces"
    )
    return {"tokens": len(vocabulary.kept), "coverage": vocabulary.coverage}
