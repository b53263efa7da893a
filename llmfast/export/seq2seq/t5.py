"""T5, T5 1.1 and FLAN-T5: relative positions, RMS norms before the sublayers, no biases.

Source: https://arxiv.org/abs/1910.10683
"""

from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder
from llmfast.export.seq2seq._t5_family import describe_t5

TASK = "text2text-generation"


def describe(config: Any) -> EncoderDecoder:
    """Describe a `t5` model; the first one, whose head is tied, scales what the head multiplies."""
    return describe_t5(config, logits_scale=config.d_model**-0.5 if config.scale_decoder_outputs else 1.0)
