"""SmolLM3: Llama with layers that rotate nothing."""

from typing import Any

from llmfast.export.architectures import Decoder, read_decoder, windows_by_layer
from llmfast.export.rotary import read_rotary


def describe(config: Any) -> Decoder:
    """Describe a SmolLM3."""
    bias = config.attention_bias
    rotary = read_rotary(config)
    return read_decoder(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.mlp_bias,
        rotary=tuple(rotary if rotates else None for rotates in config.no_rope_layers),
        sliding_windows=windows_by_layer(config),
    )
