"""Granite: Llama with factors on embeddings, attention, residual branches and logits."""

from typing import Any

from llmfast.export.architectures import Decoder, read_decoder


def describe(config: Any) -> Decoder:
    """Describe a Granite."""
    return read_decoder(
        config,
        attention_scale=config.attention_multiplier,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logits_scale=1 / config.logits_scaling,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
