"""Llama: what every other description departs from."""

from typing import Any

from llmfast.export.architectures import Decoder, read_decoder


def describe(config: Any) -> Decoder:
    """Describe a Llama, with biases where the config asks for them."""
    bias = config.attention_bias
    return read_decoder(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)
