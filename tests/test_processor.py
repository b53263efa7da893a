"""What the processor is known for, and int8 products that no processor spoils."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmfast import processor
from llmfast.graph.builder import CONTRIB
from llmfast.processor import instruction_sets, processor_name, saturates_int8
from llmfast.runtime import open_session


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    processor._fields.cache_clear()
    yield
    processor._fields.cache_clear()


@pytest.mark.parametrize(
    ("cpuinfo", "name", "sets", "saturates"),
    [
        ("model name\t: EPYC\nflags\t\t: fpu sse2 avx avx2 sha_ni\n\nmodel name\t: other\n", "EPYC", ["avx2"], True),
        ("model name\t: Xeon\nflags\t\t: sse2 avx2 avx512f avx512bw\n", "Xeon", ["avx2", "avx512f"], True),
        ("model name\t: Zen 5\nflags\t\t: sse2 avx2 avx_vnni\n", "Zen 5", ["avx2", "avx_vnni"], False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", None, ["asimddp"], False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", None, [], False),
        (None, None, [], False),
    ],
)
def test_a_processor_is_what_linux_says(
    cpuinfo: str | None,
    name: str | None,
    sets: list[str],
    saturates: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    assert processor_name() == name or (name is None and processor_name())
    assert instruction_sets() == sets
    assert saturates_int8() is saturates


@pytest.mark.parametrize("operator", ["MatMulInteger", "MatMulIntegerToFloat"])
def test_the_largest_products_are_exact(operator: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([0, 255], np.uint8), (5, 256))
    weight = rng.choice(np.array([-128, 127], np.int8), (256, 48))
    codes[0], weight[:, 0] = 255, 127
    constants = {"weight": weight, "zero": np.array(128, np.uint8), "none": np.array(0, np.int8)}
    inputs, domain, kind = ["codes", "weight", "zero", "none"], "", TensorProto.INT32
    if operator == "MatMulIntegerToFloat":
        constants["one"] = np.array(1, np.float32)
        inputs, domain, kind = ["codes", "weight", "one", "one", "zero", "none"], CONTRIB, TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["sums"], domain=domain)],
        "products",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, ["rows", 256])],
        [helper.make_tensor_value_info("sums", kind, ["rows", 48])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    (sums,) = open_session(tmp_path / "model.onnx", threads=1).run(None, {"codes": codes})
    assert np.array_equal(sums, (codes.astype(np.int64) - 128) @ weight.astype(np.int64))
