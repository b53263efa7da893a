"""Tiny random encoders as Hugging Face folders, for the tests of exporting and running them."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "two", "dogs", "run", "by"]
_SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_ROBERTA = {"type_vocab_size": 1, "pad_token_id": 1}
_VARIANTS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16, "num_hidden_layers": 2},
    "bert": {"num_hidden_layers": 2},
    "camembert": _ROBERTA,
    "convbert": {"embedding_size": 16},
    "data2vec-text": _ROBERTA,
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "electra": {"embedding_size": 16},
    "eurobert": {"pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 8},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {"pad_token_id": 0, "num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 8},
    "mpnet": {"pad_token_id": 1},
    "nomic_bert": {"pad_token_id": 0},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "roformer": {"embedding_size": 16},
    "squeezebert": {"embedding_size": 32},
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
}


def save_encoder(folder: Path, model_type: str = "bert", auto_model: str = "AutoModel", **settings: Any) -> Any:
    """Save an encoder with random weights, biases and norms included, and return it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **_SIZES | _VARIANTS.get(model_type, {}) | settings)
    model = getattr(transformers, auto_model).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path, special_tokens: bool = True) -> None:
    """Save a tokenizer with one token per word of `WORDS`."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special_tokens:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
