"""An int8 KV cache: keys and values are stored as 8-bit codes with one scale per head and channel.

code = clip(round(x / s)), s[h, c] = max |x[h, c]| / 127 over the calibration text, for keys after their rotation.
The scales are constants of the graph, so nothing is searched at run time; a channel that goes past its range is
clipped. The cache takes a quarter of the bytes, and attention reads it as it is.
Source: KVQuant (Hooper et al. 2024, https://arxiv.org/abs/2401.18079) finds that keys want scales per channel;
operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.errors import UnsupportedError
from llmfast.graph.feeds import PAST, PRESENT
from llmfast.graph.model import OnnxModel
from llmfast.quantize.replay import Replay
from llmfast.report import progress

BITS = 8
_LARGEST = 127
_SCALE_INPUTS = 12  # GroupQueryAttention's inputs before k_scale and v_scale


def cached_values(model: OnnxModel) -> list[str]:
    """Return the keys and values that a decoder's attention caches, by name, two per layer, in the graph's order.

    Raises:
        UnsupportedError: no decoder, or one whose cache GroupQueryAttention does not write.
    """
    written = [name for node in _attention(model.proto.graph) for name in node.output[1:3]]
    cached = {output.name for output in model.proto.graph.output if output.name.startswith(PRESENT)}
    if not written or cached != set(written):
        raise UnsupportedError(
            f"`{model.path}` has no KV cache that GroupQueryAttention writes",
            "leave out --kv; decoders that `llmfast export` wrote have one",
        )
    return written


def measure_ranges(names: Sequence[str], replay: Replay) -> dict[str, np.ndarray]:
    """Return the largest magnitude of each head and channel: name -> float32 [kv_heads, head_size].

    Args:
        names: what `cached_values` returned.
        replay: a run of the float decoder over the calibration text, after its transforms: they may turn the values.
    """
    ranges = {}
    with progress("calibrating the KV cache", len(names)) as advance:
        for name in names:
            largest = [np.abs(value).max(axis=(0, 2)) for value in replay.until(name)]
            ranges[name] = np.maximum.reduce(largest)
            advance()
    return ranges


def quantize_cache(proto: onnx.ModelProto, ranges: Mapping[str, np.ndarray]) -> None:
    """Make the attention nodes of a graph, in place, store int8 keys and values.

    Args:
        proto: a decoder's graph; its cached inputs and outputs become int8.
        ranges: as `measure_ranges` gives them. A channel that is always 0 gets scale 1.
    """
    graph = proto.graph
    for node in _attention(graph):
        inputs = [*node.input, *[""] * (_SCALE_INPUTS - len(node.input))]
        for name in node.output[1:3]:
            scale = np.where(ranges[name] > 0, ranges[name] / np.float32(_LARGEST), np.float32(1))[None, :, None]
            graph.initializer.append(onnx.numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"))
            inputs.append(f"{name}.scale")
        del node.input[:]
        node.input.extend(inputs)
        for key, value in (("k_quant_type", "PER_CHANNEL"), ("v_quant_type", "PER_CHANNEL")):
            node.attribute.append(helper.make_attribute(key, value))
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", BITS))
    for entry in (*graph.input, *graph.output):
        if entry.name.startswith((PAST, PRESENT)):
            entry.type.tensor_type.elem_type = TensorProto.INT8


def _attention(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]
