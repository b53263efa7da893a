"""Marian, as the OPUS-MT models: sinusoidal positions, norms behind the sublayers, perhaps two vocabularies.

Source: https://arxiv.org/abs/1804.00344
"""

from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder
from llmfast.export.seq2seq._bart_family import describe_bart

TASK = "translation"


def describe(config: Any) -> EncoderDecoder:
    """Describe a `marian` model."""
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    table = MarianSinusoidalPositionalEmbedding(config.max_position_embeddings, config.d_model).create_weight()
    shared = config.share_encoder_decoder_embeddings
    return describe_bart(
        config,
        positions=table.numpy(),
        shared_embeddings=shared,
        vocab_size=config.vocab_size if shared else config.decoder_vocab_size,
    )
