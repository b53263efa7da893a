"""Gemma 3: Gemma 2 with normalized queries and keys in place of soft caps, and faster rotation within windows."""

from typing import Any

from llmfast.export.architectures import Decoder, Norms, read_decoder, windows_by_layer
from llmfast.export.rotary import read_rotary


def describe(config: Any) -> Decoder:
    """Describe the text model of a Gemma 3."""
    rotaries = {kind: read_rotary(config, kind) for kind in sorted(set(config.layer_types))}
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
        qk_norm="head",
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        rotary=tuple(rotaries[kind] for kind in config.layer_types),
        sliding_windows=windows_by_layer(config),
    )
