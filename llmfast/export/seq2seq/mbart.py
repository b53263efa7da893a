"""mBART and mBART-50: BART in many languages, norms before the sublayers. Source: https://arxiv.org/abs/2001.08210"""

from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder
from llmfast.export.seq2seq._bart_family import describe_bart

TASK = "translation"


def describe(config: Any) -> EncoderDecoder:
    """Describe an `mbart` model."""
    return describe_bart(config, learned_positions=2, embedding_norm=True, pre_norm=True)
