"""What BART and its descendants share: names of weights, and where their configs keep sizes."""

import math
from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder, Stack


def describe_bart(config: Any, **differences: Any) -> EncoderDecoder:
    """Describe a model whose config and weights are spelled as BART's."""
    shared_facts = {
        "model_type": config.model_type,
        "encoder": _stack(config, config.encoder_layers, config.encoder_attention_heads),
        "decoder": _stack(config, config.decoder_layers, config.decoder_attention_heads),
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "context_length": getattr(config, "max_position_embeddings", None),  # Whisper has one for each stack
        "norm_epsilon": 1e-5,
        "spell": _spell,
        "embedding_scale": math.sqrt(config.d_model) if config.scale_embedding else 1.0,
        "activation": config.activation_function,
    }
    return EncoderDecoder(**shared_facts | differences)


def _stack(config: Any, num_layers: int, num_heads: int) -> Stack:
    return Stack(num_layers, num_heads, config.d_model // num_heads)


def _spell(name: str) -> str:
    return name if name.startswith(("lm_head", "final_logits_bias")) else f"model.{name}"
