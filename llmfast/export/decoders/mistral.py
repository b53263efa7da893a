"""Mistral: every layer looks back over one window."""

from typing import Any

from llmfast.export.architectures import Decoder, one_window, read_decoder


def describe(config: Any) -> Decoder:
    """Describe a Mistral; newer ones have no window."""
    return read_decoder(config, sliding_windows=one_window(config))
