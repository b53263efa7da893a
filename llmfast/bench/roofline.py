"""The roofline of decode: a token needs every weight once, so bandwidth / bytes is the most tokens per second.

What a token reads is the weights that its layers multiply by (of a table of embeddings one row, of experts those
chosen) and the keys and values cached so far. https://doi.org/10.1145/1498765.1498785 (Williams et al. 2009)
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llmfast import report
from llmfast.bench.contestant import Contestant
from llmfast.bench.workload import Workload, case_of
from llmfast.bundle import ModelBundle
from llmfast.errors import LlmfastError
from llmfast.graph.model import OnnxModel, tensor_bytes
from llmfast.graph.view import GraphView, attribute

# Much more than the caches hold together.
_READ_BYTES = 512 << 20
_PASSES = 5
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_EXPERTS = ("MoE", "QMoE")
_CACHE_BYTES = {1: 4, 10: 2, 16: 2, 3: 1, 2: 1}  # TensorProto.DataType -> bytes of an element


def file_rooflines(contestants: Sequence[Contestant], workload: Workload) -> dict[str, Any]:
    """File `bytes_per_token`, `roofline_tokens_per_s` and `roofline_share` of decoders on the CPU.

    Of batches `cache_bytes` too, of the positions in use at the end: a process's peak memory is of all sizes together.

    Returns:
        `read_bandwidth_bytes_per_s` of each number of threads.
    """
    measured: dict[int, float] = {}
    for one in contestants:
        if one.failure is not None or one.provider != "cpu":
            continue
        if one.threads not in measured:
            measured[one.threads] = measure_bandwidth(one.threads)
        try:
            weights, cache = count_bytes(one.bundle)
        except LlmfastError as error:
            report.note(f"note: `{one.label}` has no roofline: {error.message}")
            continue
        for shape, (batch, length) in workload.shapes.items():
            case = case_of(shape, workload.shapes)
            # The mean position of the tokens generated.
            read = weights / batch + cache * (length + workload.output_tokens / 2)
            limit, speed = measured[one.threads] / read, one.figures.get(f"decode_tokens_per_s{case}")
            if any(width > 1 for width, _ in workload.shapes.values()):
                one.figures[f"cache_bytes{case}"] = cache * batch * (length + workload.output_tokens)
            one.figures |= {f"bytes_per_token{case}": read, f"roofline_tokens_per_s{case}": limit}
            one.figures[f"roofline_share{case}"] = None if speed is None else speed / limit
    return {"read_bandwidth_bytes_per_s": {str(threads): value for threads, value in measured.items()}}


def measure_bandwidth(threads: int, clock: Callable[[], float] = time.perf_counter, size: int = _READ_BYTES) -> float:
    """Return how fast memory can be read, in bytes per second: the best of a few passes.

    Args:
        threads: that read at the same time, each its part.
        clock: monotonic seconds.
        size: bytes to read in a pass.
    """
    parts = np.array_split(np.ones(size // 8, np.int64), threads)

    def read(part: np.ndarray) -> int:
        return int(np.bitwise_or.reduce(part))  # one instruction a word: memory is what takes the time

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            start = clock()
            list(pool.map(read, parts))
            best = max(best, size / (clock() - start))
    return best


def count_bytes(bundle: ModelBundle) -> tuple[float, float]:
    """Return the bytes of weights that a decoder reads for a token, and of the cache for each position before it."""
    model = OnnxModel.load(bundle.model, any_opset=True)
    view = GraphView(model)
    shares: dict[str, float] = {}
    for node in view.nodes:
        share = 0.0 if node.op_type in _LOOKUPS else 1.0
        for name in map(view.origin, node.input):
            if name not in model.initializers:
                continue
            if node.op_type in _EXPERTS and len(model.initializers[name].dims) > 1:
                share = attribute(node, "k", 1) / model.initializers[name].dims[0]
            shares[name] = max(shares.get(name, 0.0), share)
    weights = sum(share * tensor_bytes(model.initializers[name]) for name, share in shares.items())
    cache = 0.0
    for value in model.proto.graph.input:
        kind = value.type.tensor_type
        sizes = [size.dim_value for size in kind.shape.dim]
        if value.name.startswith("past") and len(sizes) == 4:
            cache += sizes[1] * sizes[3] * _CACHE_BYTES.get(kind.elem_type, 4)
    return weights, cache
