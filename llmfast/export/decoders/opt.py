"""OPT: learned positions from row 2 on, LayerNorm, ReLU; the 350m model normalizes sums and has a narrow embedding."""

from typing import Any

from llmfast.export.architectures import Decoder, Norms, read_decoder

_STORED = {
    "model.embed_tokens": "model.decoder.embed_tokens",
    "model.embed_positions": "model.decoder.embed_positions",
    "model.project_in": "model.decoder.project_in",
    "model.project_out": "model.decoder.project_out",
    "model.layers": "model.decoder.layers",
    "input_layernorm": "self_attn_layer_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "post_attention_layernorm": "final_layer_norm",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
    "model.norm": "model.decoder.final_layer_norm",
}


def describe(config: Any) -> Decoder:
    """Describe an OPT."""
    norms_before = config.do_layer_norm_before
    return read_decoder(
        config,
        embedding_size=config.word_embed_proj_dim,
        intermediate_size=config.ffn_dim,
        num_key_value_heads=config.num_attention_heads,
        norm="layer",
        norm_bias=True,
        norm_epsilon=1e-5,
        norms=Norms() if norms_before else Norms("", "input_layernorm", "", "post_attention_layernorm"),
        norms_the_sum=not norms_before,
        final_norm=norms_before and not config._remove_final_layer_norm,
        rotary=(None,) * config.num_hidden_layers,
        position_offset=2,
        qkv_bias=config.enable_bias,
        output_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        activation=config.activation_function,
        gated=False,
        stored=_STORED,
    )
