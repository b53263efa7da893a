"""Qwen2 and 2.5: biases on queries, keys and values; windows in the upper layers, if at all."""

from typing import Any

from llmfast.export.architectures import Decoder, read_decoder, windows_by_layer


def describe(config: Any) -> Decoder:
    """Describe a Qwen2."""
    return read_decoder(config, qkv_bias=True, sliding_windows=windows_by_layer(config))
