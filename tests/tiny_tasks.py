"""Tiny random encoders with heads, and a tokenizer of word pieces that transformers reads too."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llmfast import registry
from llmfast.bundle import ModelBundle
from llmfast.export.stage import export
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
HEADS = {
    "token-classification": {"id2label": dict(enumerate(LABELS))},
    "question-answering": {},
    "fill-mask": {},
    "text-ranking": {"num_labels": 1},
}
TASKS = tuple(HEADS)
QUESTION = "Where is the cat?"
CONTEXT = " ".join(SENTENCES) + " The dog sat in Berlin."


@dataclass(frozen=True)
class Head:
    """A checkpoint as PyTorch has it, and its bundle."""

    model: Any
    source: Path
    bundle: ModelBundle

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers reads it."""
        return transformers.AutoTokenizer.from_pretrained(self.source)

    def logits(self, *texts: str, name: str = "logits") -> np.ndarray:
        """PyTorch's output for a text or a pair, float64."""
        encoded = self.tokenizer(*texts, return_tensors="pt", truncation=True)
        inputs = self.bundle.manifest.graphs["model"]["inputs"]  # RoBERTa's kin knows one type of token
        with torch.no_grad():
            return self.model(**{key: encoded[key] for key in inputs})[name][0].double().numpy()


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


def export_head(folder: Path, task: str, model_type: str) -> Head:
    """Save a family's head for a task, and export it."""
    auto_model = registry.load("tasks", task).AUTO_MODEL
    model = save_head(folder / "source", model_type, auto_model, vocab_size=len(PIECES), **HEADS[task])
    return Head(model, folder / "source", export(str(folder / "source"), folder / "bundle"))
