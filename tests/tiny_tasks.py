"""Tiny random encoders with heads, and a tokenizer of word pieces that transformers reads too."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tests.tiny_encoder import save_encoder

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
PIECES = [*SPECIAL.values(), "[MASK]", "the", "cat", "dog", "##s", "sat", "run", "##ning", "on", "a", "mat", "in"]
PIECES += ["par", "##is", "ber", "##lin", ".", ",", "who", "where", "##se", "it", "is"]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SENTENCES = [
    "The cats sat on a mat in Paris, running.",
    "Dogs",
    "Berlin is in the cat , who is it. Zebra Paris   Berlin",
    "a dog running in paris . the cat is on the mat . where is it , who is whose cat in berlin .",
]


def save_head(folder: Path, model_type: str, auto_model: str, **settings: Any) -> Any:
    """Save a random encoder with a head, and return it."""
    model = save_encoder(folder, model_type, auto_model, **settings)
    save_word_pieces(folder)
    return model


def save_word_pieces(folder: Path, max_length: int = 30) -> None:
    """Save a lower-casing tokenizer of word pieces, for single texts and pairs."""
    backend = tokenizers.Tokenizer(
        models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens([*SPECIAL.values(), "[MASK]"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", PIECES.index("[CLS]")), ("[SEP]", PIECES.index("[SEP]"))],
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = SPECIAL | {
        "mask_token": "[MASK]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
