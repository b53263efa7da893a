"""What ONNX Runtime's kernels do on this processor, found without llmfast."""

from functools import cache

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

_IN, _OUT, _BLOCK = 64, 48, 32


@cache
def rows_are_independent() -> bool:
    """Return whether 4-bit products of blocks of 32 give a row the same bits whatever rows are beside it.

    They do with AVX-512 and VNNI; with AVX2 alone one row takes another kernel than two.
    """
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (_OUT, _IN // _BLOCK, _BLOCK // 2)).astype(np.uint8)
    scales = rng.uniform(0.5, 1.5, (_OUT, _IN // _BLOCK)).astype(np.float32)
    settings = {"K": _IN, "N": _OUT, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **settings)],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", _IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", _OUT])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = rng.standard_normal((8, _IN)).astype(np.float32)
    alone = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
    return all(np.array_equal(session.run(None, {"x": x[:rows]})[0], alone[:rows]) for rows in (2, 3, 4, 8))
