"""What the checks of a sound model cost, as a share of opening it: python scripts/guard_cost.py [GB].

Writes a graph with GB (2) of external float32 weights, which is removed again, opens it with ONNX Runtime as `infer`
does, and runs it once. Exits with 1 when the checks take more than 3 % of that.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from llmfast.graph.model import check_file  # noqa: E402
from llmfast.runtime import open_session  # noqa: E402

_SIZE = 2048
_MOST = 0.03


def _write(folder: Path, gigabytes: float) -> Path:
    layers = max(1, round(gigabytes * 1e9 / (4 * _SIZE**2)))
    rng = np.random.default_rng(0)
    block = (rng.standard_normal((_SIZE, _SIZE)) / _SIZE**0.5).astype(np.float32).tobytes()
    weights = []
    with (folder / "weights.data").open("wb") as file:
        for layer in range(layers):
            tensor = TensorProto(name=f"w{layer}", dims=[_SIZE, _SIZE], data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.data"), ("offset", file.tell()), ("length", len(block))):
                tensor.external_data.add(key=key, value=str(value))
            file.write(block)
            weights.append(tensor)
    nodes = [helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"]) for layer in range(layers)]
    values = [helper.make_tensor_value_info(f"x{end}", TensorProto.FLOAT, ["n", _SIZE]) for end in (0, layers)]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "a.onnx")
    return folder / "a.onnx"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="llmfast-guard-") as made:
        model = _write(Path(made), float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
        checks = []
        for _ in range(5):
            started = time.perf_counter()
            size = check_file(model)
            checks.append(time.perf_counter() - started)
        started = time.perf_counter()
        session = open_session(model)
        session.run(None, {"x0": np.ones((1, _SIZE), np.float32)})
        whole = time.perf_counter() - started
    share = sorted(checks)[2] / whole
    print(f"{size / 1e9:.2f} GB: checks {sorted(checks)[2] * 1000:.1f} ms of {whole:.2f} s: {share:.2%}")
    if share > _MOST:
        raise SystemExit(1)


main()
