"""GPT-2: learned positions, LayerNorm, a plain MLP, weights stored as `[in_features, out_features]`."""

from typing import Any

from llmfast.export.architectures import Decoder, read_decoder

_STORED = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.layers": "transformer.h",
    "input_layernorm": "ln_1",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
    "model.norm": "transformer.ln_f",
}


def describe(config: Any) -> Decoder:
    """Describe a GPT-2."""
    return read_decoder(
        config,
        num_key_value_heads=config.num_attention_heads,
        intermediate_size=config.n_inner or 4 * config.hidden_size,
        norm="layer",
        norm_bias=True,
        norm_epsilon=config.layer_norm_epsilon,
        rotary=(None,) * config.num_hidden_layers,
        position_offset=0,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        attention_scale=None if config.scale_attn_weights else 1.0,
        activation=config.activation_function,
        gated=False,
        stored=_STORED,
        stored_transposed=True,
        qkv_layout="packed",
    )
