"""mT5: relative positions, RMS norms before the sublayers, no biases. Source: https://arxiv.org/abs/2010.11934"""

from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder
from llmfast.export.seq2seq._t5_family import describe_t5

TASK = "text2text-generation"


def describe(config: Any) -> EncoderDecoder:
    """Describe a `mt5` model."""
    return describe_t5(config)
