"""Cohere's Command R: attention and MLP in parallel behind one LayerNorm without bias, interleaved rotation."""

from typing import Any

from llmfast.export.architectures import Decoder, Norms, read_decoder


def describe(config: Any) -> Decoder:
    """Describe a Command R."""
    return read_decoder(
        config,
        norm="layer",
        norm_epsilon=config.layer_norm_eps,
        norms=Norms(before_mlp="input_layernorm"),
        parallel=True,
        rotary_interleaved=True,
        logits_scale=config.logit_scale,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
    )
