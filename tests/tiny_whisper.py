"""A tiny random Whisper as a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|fr|>", "<|transcribe|>", "<|translate|>"]
SPECIAL += ["<|notimestamps|>"]
TOKENS = [*LETTERS, *(f"Ġ{letter}" for letter in LETTERS), *SPECIAL, "<|0.00|>", "<|0.02|>"]
IDS = {token: index for index, token in enumerate(TOKENS)}
SECONDS = 1
MULTILINGUAL = {
    "lang_to_id": {code: IDS[code] for code in ("<|en|>", "<|de|>", "<|fr|>")},
    "task_to_id": {"transcribe": IDS["<|transcribe|>"], "translate": IDS["<|translate|>"]},
    "no_timestamps_token_id": IDS["<|notimestamps|>"],
    "is_multilingual": True,
    "suppress_tokens": [3, 5, *range(IDS["<|startoftranscript|>"], len(TOKENS))],
    "begin_suppress_tokens": [7, IDS["<|endoftext|>"]],
}


def save_whisper(folder: Path, generation: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Save a Whisper that hears a second, random weights, biases and norms included, and return it."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": len(TOKENS) + 3,
        "num_mel_bins": 12,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "max_source_positions": 50 * SECONDS,
        "max_target_positions": 40,
        "init_std": 0.5,
        "pad_token_id": IDS["<|endoftext|>"],
        "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|endoftext|>"],
        "decoder_start_token_id": IDS["<|startoftranscript|>"],
    }
    config = transformers.WhisperConfig(**sizes | settings)
    model = transformers.WhisperForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        rows = model.get_input_embeddings().weight
        rows[IDS["<|endoftext|>"]] = 1.05 * rows[IDS["e"]]  # so that some texts end
    for key, value in (MULTILINGUAL if generation is None else generation).items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=12, chunk_length=SECONDS).save_pretrained(folder)
    backend = tokenizers.Tokenizer(models.BPE(dict(IDS), []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return model
