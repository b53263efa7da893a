"""Tiny random encoder-decoders as Hugging Face folders, for the tests of exporting and running them."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llmfast.bundle import ModelBundle
from llmfast.export import seq2seq_parity
from llmfast.export.stage import ExportOptions, export

torch.set_num_threads(1)  # models this small only wait for other threads

VOCAB_SIZE = 120
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LANGUAGES = ["__en__", "__de__", "__fr__"]  # of m2m_100; the others have something else in their places
LETTERS = "abcdefghijklmnopqrstuvwxyz.,:!?-"
WORDS = [f"▁{letter}" for letter in LETTERS] + list(LETTERS) + ["▁"]

_BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "init_std": 0.25,
    "scale_embedding": False,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_T5 = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("bart", _BART),
    "bart-relu-scaled": ("bart", _BART | {"activation_function": "relu", "scale_embedding": True}),
    "mbart": ("mbart", _BART | {"scale_embedding": True}),
    "marian": ("marian", _BART | {"activation_function": "swish", "decoder_start_token_id": 1}),
    "marian-two-vocabularies": (
        "marian",
        _BART | {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 90, "decoder_start_token_id": 1},
    ),
    "pegasus": ("pegasus", _BART | {"decoder_start_token_id": 1}),
    "m2m_100": ("m2m_100", _BART | {"activation_function": "relu", "scale_embedding": True}),
    "t5": ("t5", _T5 | {"tie_word_embeddings": True}),
    "t5-gated-untied": ("t5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _T5),
}


def save_seq2seq(folder: Path, name: str, **settings: Any) -> Any:
    """Save an encoder-decoder with random weights, biases and norms included, and return it."""
    model_type, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes | settings)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embed_positions" in key and model_type in ("marian", "pegasus"):
                continue  # sinusoids, not trained
            if key.endswith("bias") or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if "relative_attention_bias" in key:
                parameter.copy_(torch.randn_like(parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias) * 0.3)
        if name == "t5-gated-untied":
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, LANGUAGES if model_type == "m2m_100" else ["<x>", "<y>", "<z>"])
    return model


class InProcess:
    """Stands in for `Worker`: a process each would take longer than all the rest."""

    def __init__(self, target: str, *args: Any) -> None:
        module, _, name = target.partition(":")
        self.held = getattr(importlib.import_module(module), name)(*args)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.held, method)(*args)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None: ...


def export_seq2seq(folder: Path, name: str, task: str | None = None, **settings: Any) -> ModelBundle:
    """Save a random encoder-decoder in `checkpoint` of a folder, and return the bundle that it is exported to."""
    save_seq2seq(folder / "checkpoint", name, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seq2seq_parity, "Worker", InProcess)
        return export(str(folder / "checkpoint"), folder / "bundle", ExportOptions(task=task, threads=1))


def exports_in(folders: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Return a function that gives the bundle and the PyTorch model of a name in `ARCHITECTURES`, made once each."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = folders.mktemp(name)
            made[name] = export_seq2seq(folder, name).path, seq2seq_parity.load_reference(folder / "checkpoint")
        return made[name]

    return get


def save_tokenizer(folder: Path, others: list[str]) -> None:
    """Save a tokenizer of letters, `▁` before the first one of a word, which appends the end token."""
    special = [*SPECIAL, *others]
    vocabulary = [*special, *WORDS]
    merges = [("▁", letter) for letter in LETTERS]
    backend = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(vocabulary)}, merges, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
