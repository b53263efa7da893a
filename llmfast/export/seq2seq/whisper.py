"""Whisper: a spectrogram through two convolutions, BART's layers with norms before the sublayers.

Source: https://arxiv.org/abs/2212.04356
"""

from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder, Spectrogram
from llmfast.export.seq2seq._bart_family import describe_bart

TASK = "automatic-speech-recognition"


def describe(config: Any) -> EncoderDecoder:
    """Describe a `whisper` model."""
    return describe_bart(
        config,
        context_length=config.max_target_positions,
        spell=lambda name: "proj_out.weight" if name == "lm_head.weight" else f"model.{name}",
        shared_embeddings=False,
        embedding_scale=1.0,  # `scale_embedding` is read by no layer of transformers' Whisper
        learned_positions=0,
        pre_norm=True,
        key_bias=False,
        source=Spectrogram(config.num_mel_bins, config.max_source_positions),
    )
