"""What a graph is fed with, whether llmfast or another exporter made it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from llmfast.errors import UnsupportedError

# Prefixes of the inputs and outputs that hold a decoder's cache.
PAST = "past_key_values."
PRESENT = "present."
# Prefix of what a decoder looks the source up by: outputs of the encoder, inputs of the decoder.
CROSS = "cross_key_values."
CROSS_MASK = "encoder_attention_mask"  # of the source, which a decoder takes beside them
FEATURES = "input_features"  # a spectrogram, where an encoder takes no tokens
# The other inputs of llmfast's own decoder graph.
CONTRACT = ("input_ids", "seqlens_k", "total_sequence_length", "num_logits")
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph, with the attributes that those of a session have."""

    name: str
    type: str
    shape: list[int | str | None]


def graph_inputs(graph: onnx.GraphProto) -> list[GraphInput]:
    """Return the inputs as a session's `get_inputs` gives them, without a session."""
    initializers = {tensor.name for tensor in graph.initializer}
    return [_graph_input(value) for value in graph.input if value.name not in initializers]


def _graph_input(value: onnx.ValueInfoProto) -> GraphInput:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    names = [name for name, known in DTYPES.items() if np.dtype(known) == dtype]
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]
    return GraphInput(value.name, names[0] if names else f"tensor({dtype})", shape)


def present_of(past: str) -> str:
    """Return the output that a cache comes back in."""
    return past.replace(PAST, PRESENT, 1)


def sequence_feeds(inputs: Sequence[Any], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs for sequences of one length, from an empty cache, with logits at every position.

    Args:
        inputs: as `graph_inputs`, or a session's `get_inputs`, gives them.
        ids: int64 [batch, seq].

    Raises:
        UnsupportedError: an input that can't be made from token ids.
    """
    past = [value for value in inputs if value.name.startswith(PAST)]
    feeds = step_feeds([value for value in inputs if value not in past], ids, 0)
    for value in past:
        feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), DTYPES[value.type])
    return feeds


def step_feeds(inputs: Sequence[Any], ids: np.ndarray, past: int) -> dict[str, np.ndarray]:
    """Return the inputs for tokens that follow `past` others, with logits at every position; caches apart.

    Args:
        inputs: the session's inputs, those that hold a cache left out.
        ids: int64 [batch, seq].
        past: positions in the cache.

    Raises:
        UnsupportedError: an input that can't be made from token ids.
    """
    batch, length = ids.shape
    total = past + length
    positions = np.arange(past, total)
    known = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, total), np.int64),
        "token_type_ids": np.zeros(ids.shape, np.int64),
        "position_ids": np.tile(positions, (batch, 1)),
        "cache_position": positions,
        "seqlens_k": np.full(batch, total - 1),
        "total_sequence_length": np.array(total),
        "num_logits": np.array([length]),
        "num_logits_to_keep": np.array(0),  # all
        "use_cache_branch": np.array([past > 0]),
    }
    for value in inputs:
        if value.name not in known or value.type not in DTYPES:
            raise UnsupportedError(
                f"the graph has an input `{value.name}` of {value.type} that is not made from token ids",
                f"known inputs: {', '.join(known)}",
            )
    return {value.name: known[value.name].astype(DTYPES[value.type], copy=False) for value in inputs}
