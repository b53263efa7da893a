"""PEGASUS: sinusoidal positions, norms before the sublayers. Source: https://arxiv.org/abs/1912.08777"""

from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder
from llmfast.export.seq2seq._bart_family import describe_bart

TASK = "summarization"


def describe(config: Any) -> EncoderDecoder:
    """Describe a `pegasus` model."""
    from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding

    table = PegasusSinusoidalPositionalEmbedding(config.max_position_embeddings, config.d_model).create_weight()
    return describe_bart(config, positions=table.numpy(), pre_norm=True)
