"""GPT-NeoX and Pythia: attention and MLP in parallel, rotation of a part of each head, LayerNorm, a plain MLP."""

from typing import Any

from llmfast.export.architectures import Decoder, read_decoder

_STORED = {
    "model.embed_tokens": "gpt_neox.embed_in",
    "model.layers": "gpt_neox.layers",
    "self_attn.qkv_proj": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "model.norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}


def describe(config: Any) -> Decoder:
    """Describe a GPT-NeoX."""
    return read_decoder(
        config,
        num_key_value_heads=config.num_attention_heads,
        norm="layer",
        norm_bias=True,
        norm_epsilon=config.layer_norm_eps,
        parallel=config.use_parallel_residual,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=True,
        gated=False,
        stored=_STORED,
        qkv_layout="by_head",
    )
