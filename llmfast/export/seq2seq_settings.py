"""What lies beside the graphs of an encoder-decoder: tokenizers, generation settings, languages."""

import re
from pathlib import Path
from typing import Any

from llmfast.bundle import read_json
from llmfast.errors import InputError
from llmfast.export.checkpoint import SafetensorsCheckpoint, copy_companions
from llmfast.export.encoder_decoder import Spectrogram
from llmfast.export.sentencepiece_tokenizer import write_m2m_tokenizer, write_marian_tokenizers
from llmfast.preprocessor import PREPROCESSOR
from llmfast.spectrogram import SpectrogramProcessor

# How multilingual models spell the tokens of their languages, the code in brackets.
_LANGUAGE_TOKENS = (
    re.compile(r"__([a-z]{2,3})__"),  # M2M-100
    re.compile(r"([a-z]{3}_[A-Z][a-z]{3})"),  # NLLB
    re.compile(r"([a-z]{2}_[A-Z]{2})"),  # mBART
    re.compile(r">>([A-Za-z_]+)<<"),  # OPUS-MT
)


def write_seq2seq_companions(checkpoint: SafetensorsCheckpoint, folder: Path) -> None:
    """Copy or convert tokenizers, copy configs, and write generation_config.json even where config.json stands for it.

    Raises:
        InputError: a tokenizer file is missing or malformed.
    """
    if not (checkpoint.path / "tokenizer.json").is_file():
        if checkpoint.config.model_type == "marian":
            write_marian_tokenizers(checkpoint.path, folder)
        elif checkpoint.config.model_type == "m2m_100" and (checkpoint.path / "vocab.json").is_file():
            write_m2m_tokenizer(checkpoint.path, folder)
    copy_companions(checkpoint.path, folder)
    if not (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(read_json(checkpoint.path / "config.json")).save_pretrained(folder)


def check_spectrogram(source: Path, wanted: Spectrogram) -> None:
    """Refuse a preprocessor_config.json that makes other spectrograms than the model takes.

    Raises:
        InputError: missing or malformed, or of other sizes.
        UnsupportedError: another processor, or a field that is not understood.
    """
    made = SpectrogramProcessor.load(source)
    if (made.mel_bins, made.frames) != (wanted.mel_bins, wanted.frames):
        raise InputError(
            f"`{source / PREPROCESSOR}` makes spectrograms of {made.mel_bins}x{made.frames}, "
            f"config.json wants {wanted.mel_bins}x{wanted.frames}"
        )


def read_languages(folder: Path) -> dict[str, Any] | None:
    """Return how a multilingual model is told its languages, None when it is not told.

    Returns:
        `tokens`: code -> token; `source`: where the source's token goes, `prefix`, `suffix` or `none`;
        `target`: where the target's goes, `forced_bos_token_id`, `decoder_start_token_id` or `prefix` (of the source).
    """
    document = read_json(folder / "tokenizer.json")
    known = [entry["content"] for entry in document.get("added_tokens", ())]
    for pattern in _LANGUAGE_TOKENS:
        matches = [pattern.fullmatch(token) for token in known]
        tokens = {match[1]: match[0] for match in matches if match is not None}
        if tokens:
            break
    else:
        return None
    settings = folder / "tokenizer_config.json"
    config: dict[str, Any] = read_json(settings) if settings.is_file() else {}
    source, target = "prefix", "forced_bos_token_id"
    if next(iter(tokens.values())).startswith(">>"):
        source, target = "none", "prefix"
    elif str(config.get("tokenizer_class", "")).startswith("MBartTokenizer"):
        source, target = "suffix", "decoder_start_token_id"
    elif config.get("legacy_behaviour"):
        source = "suffix"
    return {"tokens": dict(sorted(tokens.items())), "source": source, "target": target}
