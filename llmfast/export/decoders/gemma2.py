"""Gemma 2: soft caps, norms on both sides of attention and MLP, a window in every other layer."""

from typing import Any

from llmfast.export.architectures import Decoder, Norms, read_decoder, windows_by_layer


def describe(config: Any) -> Decoder:
    """Describe a Gemma 2."""
    return read_decoder(
        config,
        activation=config.hidden_activation,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping or 0.0,
        logits_softcap=config.final_logit_softcapping or 0.0,
        embedding_scale=config.hidden_size**0.5,
        norm_offset=1.0,
        norms=Norms(
            after_attention="post_attention_layernorm",
            before_mlp="pre_feedforward_layernorm",
            after_mlp="post_feedforward_layernorm",
        ),
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        sliding_windows=windows_by_layer(config),
    )
