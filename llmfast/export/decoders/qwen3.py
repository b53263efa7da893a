"""Qwen3: RMS norm over each head of queries and keys."""

from typing import Any

from llmfast.export.architectures import Decoder, read_decoder, windows_by_layer


def describe(config: Any) -> Decoder:
    """Describe a Qwen3."""
    bias = config.attention_bias
    windows = windows_by_layer(config)
    return read_decoder(config, qk_norm="head", qkv_bias=bias, output_bias=bias, sliding_windows=windows)
