"""M2M-100 and NLLB-200: sinusoidal positions behind the padding index, norms before the sublayers.

Source: https://arxiv.org/abs/2010.11125, https://arxiv.org/abs/2207.04672
"""

from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder
from llmfast.export.seq2seq._bart_family import describe_bart

TASK = "translation"


def describe(config: Any) -> EncoderDecoder:
    """Describe an `m2m_100` model."""
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding

    first = config.pad_token_id + 1
    rows = first + config.max_position_embeddings
    table = M2M100SinusoidalPositionalEmbedding.get_embedding(rows, config.d_model, config.pad_token_id)
    return describe_bart(config, positions=table[first:].numpy(), pre_norm=True)
