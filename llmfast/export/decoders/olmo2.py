"""OLMo 2: norms after attention and MLP only, and over all queries and all keys."""

from typing import Any

from llmfast.export.architectures import Decoder, Norms, read_decoder


def describe(config: Any) -> Decoder:
    """Describe an OLMo 2."""
    return read_decoder(
        config,
        norms=Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
        qk_norm="width",
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
    )
