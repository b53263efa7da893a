"""BART: learned positions, norms behind the sublayers. Source: https://arxiv.org/abs/1910.13461"""

from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder
from llmfast.export.seq2seq._bart_family import describe_bart

TASK = "text2text-generation"


def describe(config: Any) -> EncoderDecoder:
    """Describe a `bart` model."""
    return describe_bart(config, learned_positions=2, embedding_norm=True)
