"""Tiny random encoders of sound as Hugging Face folders, and WAV files."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "A", "O", "'", "N", "S", ".", ","]
RATE = 16000
SHORTEST = 30  # of the small encoder below


def save_speech_encoder(
    folder: Path,
    model_type: str = "wav2vec2",
    auto_model: str = "AutoModelForCTC",
    lower_case: bool = False,
    **settings: Any,
) -> Any:
    """Save an encoder of sound with random weights, its processor and tokenizer; return it."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (5, 2, 1),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(model_type, **sizes | settings)
    model = getattr(transformers, auto_model).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json", do_lower_case=lower_case)
    tokenizer.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return model


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, width: int = 2) -> Path:
    """Write int16 samples [samples] or [samples, channels]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype({1: np.uint8, 2: "<i2", 4: "<i4"}[width]).tobytes())
    return path


def make_sound(length: int, *channels: int) -> np.ndarray:
    """Return noise that swells, int16 [length, channels]."""
    rng = np.random.default_rng(length)
    loudness = np.sin(np.linspace(0, 9, length)) ** 2 * 20000 + 50
    return (rng.uniform(-1, 1, (*channels, length)) * loudness + 300).astype(np.int16).T
