"""Phi-3 and Phi-4: packed projections in the checkpoint, rotation of a part of each head, longrope."""

from typing import Any

from llmfast.export.architectures import Decoder, one_window, read_decoder


def describe(config: Any) -> Decoder:
    """Describe a Phi-3."""
    return read_decoder(config, qkv_layout="packed", gate_up_packed=True, sliding_windows=one_window(config))
