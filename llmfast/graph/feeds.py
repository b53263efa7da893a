"""What a graph is fed with for whole sequences, whether llmfast or another exporter made it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmfast.errors import UnsupportedError

# Prefix of the inputs that hold a decoder's cache.
PAST = "past_key_values."
# Prefix of what a decoder looks the source up by: outputs of the encoder, inputs of the decoder.
CROSS = "cross_key_values."


def sequence_feeds(inputs: Sequence[Any], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs for sequences of one length, from an empty cache, with logits at every position.

    Args:
        inputs: the session's inputs, as `get_inputs` gives them.
        ids: int64 [batch, seq].

    Raises:
        UnsupportedError: an input that can't be made from token ids.
    """
    batch, length = ids.shape
    known = {
        "input_ids": ids,
        "attention_mask": np.ones(ids.shape, np.int64),
        "token_type_ids": np.zeros(ids.shape, np.int64),
        "position_ids": np.tile(np.arange(length, dtype=np.int64), (batch, 1)),
        "seqlens_k": np.full(batch, length - 1, np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "num_logits": np.array([length], np.int64),
    }
    feeds = {}
    for value in inputs:
        if value.name.startswith(PAST):
            feeds[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
        elif value.name in known:
            feeds[value.name] = known[value.name]
        else:
            raise UnsupportedError(
                f"the graph has an input `{value.name}` that is not made from token ids",
                f"known inputs: {', '.join(known)}",
            )
    return feeds
