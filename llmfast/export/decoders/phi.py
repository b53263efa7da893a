"""Phi-1 and Phi-2: attention and MLP in parallel behind one LayerNorm, rotation of a part of each head."""

from typing import Any

from llmfast.export.architectures import Decoder, Norms, read_decoder

_STORED = {
    "self_attn.o_proj": "self_attn.dense",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "model.norm": "model.final_layernorm",
}


def describe(config: Any) -> Decoder:
    """Describe a Phi."""
    return read_decoder(
        config,
        norm="layer",
        norm_bias=True,
        norm_epsilon=config.layer_norm_eps,
        norms=Norms(before_mlp="input_layernorm"),
        parallel=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated=False,
        stored=_STORED,
    )
