"""Time ONNX Runtime's MatMulNBits for each width and block size, and compare it with NumPy.

    python scripts/time_nbits.py --shape 4096x14336 --shape 2048x2048 --tokens 1

Prints microseconds per run, the smallest of many on one core, and the relative error beside the de-quantized weight:
about 0.005 where the kernel rounds activations to int8, 0 where there is no kernel and the weight is expanded.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from llmfast.graph.builder import GraphBuilder
from llmfast.graph.packed import Grid, store_blocks, write_matmul_nbits
from llmfast.graph.weights import WeightFile
from llmfast.quantize.rounding import rtn

WIDTHS = [(2, 16), (2, 32), (2, 64), (2, 128), (4, 32), (4, 64), (4, 128), (8, 32), (8, 128)]


def open_layer(weight: np.ndarray, grid: Grid, folder: Path) -> tuple[onnxruntime.InferenceSession, np.ndarray]:
    """Return a session of one layer with one thread, and the weight that it multiplies by."""
    rounded = rtn.quantize_weight(weight, grid, rtn.Options(search_steps=1))
    weights = WeightFile(folder)
    graph = GraphBuilder(weights)
    write_matmul_nbits(graph, store_blocks(graph, "layer", rounded), rounded, "x", "y")
    kinds = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", weight.shape[1]])]
    weights.save(graph.build("layer", kinds, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return session, rounded.dequantize()


def shortest(session: onnxruntime.InferenceSession, hidden: np.ndarray, seconds: float) -> float:
    """Return the seconds of the fastest run."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, {"x": hidden})
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Time every width on every shape."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", action="append", help="NxK, may be repeated; 2048x2048 and 4096x14336")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for shape in arguments.shape or ["2048x2048", "4096x14336"]:
        rows, features = map(int, shape.split("x"))
        weight = rng.standard_normal((rows, features), np.float32)
        hidden = rng.standard_normal((arguments.tokens, features), np.float32)
        for bits, block_size in WIDTHS:
            with tempfile.TemporaryDirectory() as folder:
                session, values = open_layer(weight, Grid(bits, block_size, symmetric=bits == 8), Path(folder))
            expected = hidden @ values.T
            error = np.linalg.norm(session.run(None, {"x": hidden})[0] - expected) / np.linalg.norm(expected)
            micros = shortest(session, hidden, arguments.seconds) * 1e6
            print(f"{shape}: {bits} bits, blocks of {block_size}: {micros:.1f} us, error {error:.4f}")


if __name__ == "__main__":
    main()
