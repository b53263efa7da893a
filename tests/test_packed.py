"""Quantized weights: packing against blocks written by hand, kernels against NumPy float64."""

from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from llmfast.graph.builder import GraphBuilder
from llmfast.graph.linear import Linear
from llmfast.graph.packed import (
    Grid,
    QuantizedWeight,
    store_blocks,
    to_blocks,
    write_blocks,
    write_gather,
    write_matmul_nbits,
)
from llmfast.graph.weights import WeightFile
from llmfast.quantize.rounding import hqq, rtn
from llmfast.quantize.schemes import int8
from llmfast.runtime import open_session

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def _session(graph: GraphBuilder, weights: WeightFile, feeds: list, folder) -> onnxruntime.InferenceSession:
    output = helper.make_tensor_value_info("y", FLOAT, None)
    weights.save(graph.build("test", feeds, [output]))
    return open_session(folder / "model.onnx")


def test_pack_puts_low_bits_first() -> None:
    codes = np.array([[[1, 2, 3, 15] + [8] * 12]], np.uint8)
    zero_points = np.array([[7]], np.uint8)
    weight = QuantizedWeight(codes, np.array([[0.5]], np.float32), zero_points, Grid(4, 16, symmetric=False), 16)
    assert weight.pack().tolist() == [[[0x21, 0xF3] + [0x88] * 6]]
    assert weight.pack_zero_points().tolist() == [[0x07]]
    np.testing.assert_array_equal(weight.dequantize()[0, :4], [-3.0, -2.5, -2.0, 4.0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_loses_nothing(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 5, 16), dtype=np.uint8)
    packed = QuantizedWeight(codes, np.ones((3, 5), np.float32), None, Grid(bits, 16), 80).pack()
    places = [(packed >> (place * bits)) & ((1 << bits) - 1) for place in range(8 // bits)]
    np.testing.assert_array_equal(np.stack(places, -1).reshape(codes.shape), codes)


@pytest.mark.parametrize("block_size", [0, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_stays_within_half_a_step(bits: int, symmetric: bool, block_size: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    grid = Grid(bits, block_size, symmetric)
    plain = rtn.quantize_weight(weight, grid, rtn.Options(search_steps=1))
    step = np.repeat(plain.scales, plain.codes.shape[2], axis=1)
    error = np.abs(plain.dequantize() - weight)
    # The fitted scale is a little off the one that was rounded with, so the bound is not exactly a half.
    assert (error <= step * 0.75).all()
    searched = rtn.quantize_weight(weight, grid, rtn.Options())
    assert np.square(searched.dequantize() - weight).sum() <= np.square(plain.dequantize() - weight).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_keeps_what_is_on_the_grid(symmetric: bool) -> None:
    lowest = 1 if symmetric else 0  # a symmetric range has no use for code 0
    codes = np.random.default_rng(0).integers(lowest, 16, (4, 2, 32))
    codes[..., :2] = lowest, 15  # the ends of the range give the scale away
    weight = ((codes - 8) * np.float32(0.25)).reshape(4, 64).astype(np.float32)
    quantized = rtn.quantize_weight(weight, Grid(4, 32, symmetric), rtn.Options())
    np.testing.assert_allclose(quantized.dequantize(), weight, atol=1e-6)


@pytest.mark.parametrize("method", [rtn, hqq])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_survives_extreme_rows(symmetric: bool, method: ModuleType) -> None:
    weight = np.zeros((5, 32), np.float32)
    weight[1] = 3.0
    weight[2] = -65504
    weight[3] = 1e-40
    weight[4, 0] = 1e30
    quantized = method.quantize_weight(weight, Grid(4, 32, symmetric), method.Options())
    assert np.isfinite(quantized.scales).all()
    assert (quantized.scales > 0).all()
    np.testing.assert_array_equal(quantized.dequantize()[0], 0)
    np.testing.assert_allclose(quantized.dequantize()[1:3], weight[1:3], rtol=0.08)


@pytest.mark.parametrize(("bits", "block_size"), [(2, 32), (2, 64), (2, 128), (4, 32), (4, 128), (8, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("features", [128, 100])
def test_matmul_nbits_computes_what_dequantize_says(
    bits: int, block_size: int, symmetric: bool, features: int, tmp_path
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, features)).astype(np.float32)
    quantized = rtn.quantize_weight(weight, Grid(bits, block_size, symmetric), rtn.Options())
    weights = WeightFile(tmp_path)
    graph = GraphBuilder(weights)
    bias = rng.standard_normal(24).astype(np.float32)
    stored = store_blocks(graph, "layer", quantized)
    write_matmul_nbits(graph, stored, quantized, "x", "y", graph.weight("bias", bias))
    session = _session(graph, weights, [helper.make_tensor_value_info("x", FLOAT, [None, features])], tmp_path)
    hidden = rng.standard_normal((5, features)).astype(np.float32)
    expected = hidden.astype(np.float64) @ quantized.dequantize().astype(np.float64).T + bias
    actual = session.run(None, {"x": hidden})[0]
    # The kernel rounds activations to int8 per block, hence a tolerance of one part in 127 of the largest.
    np.testing.assert_allclose(actual, expected, atol=np.abs(expected).max() / 60)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("features", [128, 100])
@pytest.mark.parametrize(
    ("rank", "ids"),
    [(2, [[0, 49, 7], [3, 3, 1]]), (1, [0, 49, 7]), (0, 49), (3, [[[4], [2]]]), (None, [[0, 49]]), (None, [7, 3])],
)
def test_gather_reads_the_rows_of_the_head(bits: int, features: int, rank: int | None, ids: Any, tmp_path) -> None:
    table = np.random.default_rng(0).standard_normal((50, features)).astype(np.float32)
    quantized = rtn.quantize_weight(table, Grid(bits, 32), rtn.Options())
    weights = WeightFile(tmp_path)
    graph = GraphBuilder(weights)
    write_gather(graph, store_blocks(graph, "table", quantized), quantized, "ids", "y", rank)
    feeds = [helper.make_tensor_value_info("ids", INT64, [None] * np.ndim(ids))]
    session = _session(graph, weights, feeds, tmp_path)
    np.testing.assert_allclose(session.run(None, {"ids": np.array(ids)})[0], quantized.dequantize()[ids], rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_scales_are_stored_as_float16_where_it_is_precise_enough(size: float, tmp_path) -> None:
    """A weight of tiny values keeps float32 scales; either way the file holds what the codes were chosen for."""
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32) * np.float32(size)
    weight[2] *= size != 1  # a row of zeros among ordinary ones
    quantized = rtn.quantize_weight(weight, Grid(4, 32), rtn.Options())
    weights = WeightFile(tmp_path)
    graph = GraphBuilder(weights)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    write_blocks(graph, Linear("layer", node, "w", True, "", weight.shape), quantized)
    session = _session(graph, weights, [helper.make_tensor_value_info("x", FLOAT, ["batch", 64])], tmp_path)
    proto = onnx.load(tmp_path / "model.onnx")
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer if "scale" in tensor.name}
    name = "layer.weight_scale.half" if size == 1 else "layer.weight_scale"
    assert types == {name: TensorProto.FLOAT16 if size == 1 else FLOAT}
    hidden = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    expected = hidden @ quantized.dequantize().T
    np.testing.assert_allclose(session.run(None, {"x": hidden})[0], expected, atol=np.abs(expected).max() / 60)


def _int8_layer(tmp_path, weight: np.ndarray, opset: int = 21) -> tuple[QuantizedWeight, onnxruntime.InferenceSession]:
    quantized = rtn.quantize_weight(weight, int8.grid(int8.Options()), rtn.Options())
    weights = WeightFile(tmp_path)
    graph = GraphBuilder(weights, opset)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    int8.write_per_token(graph, Linear("layer", node, "w", True, "", weight.shape), quantized)
    feeds = [helper.make_tensor_value_info("x", FLOAT, ["batch", "seq", weight.shape[1]])]
    return quantized, _session(graph, weights, feeds, tmp_path)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_w8a8_is_the_arithmetic_it_claims(opset: int, tmp_path) -> None:
    rng = np.random.default_rng(0)
    quantized, session = _int8_layer(tmp_path, rng.standard_normal((24, 96)).astype(np.float32), opset)
    hidden = rng.standard_normal((2, 7, 96)).astype(np.float32)
    hidden[0, 3] *= 1000  # an outlier token
    hidden[1, 2] = 0
    scale = np.abs(hidden).max(-1, keepdims=True) * np.float32(1 / 127)
    codes = np.rint(hidden / np.where(scale == 0, 1, scale)).astype(np.float64)
    expected = codes @ quantized.dequantize().astype(np.float64).T * scale
    np.testing.assert_allclose(session.run(None, {"x": hidden})[0], expected, rtol=1e-4, atol=1e-5)


def test_w8a8_of_a_token_does_not_depend_on_its_batch(tmp_path) -> None:
    rng = np.random.default_rng(0)
    _, session = _int8_layer(tmp_path, rng.standard_normal((24, 96)).astype(np.float32))
    hidden = rng.standard_normal((1, 9, 96)).astype(np.float32)
    hidden[0, 4] *= 100
    together = session.run(None, {"x": hidden})[0]
    alone = np.concatenate([session.run(None, {"x": hidden[:, i : i + 1]})[0] for i in range(9)], axis=1)
    np.testing.assert_array_equal(together, alone)


def test_last_block_is_filled_with_zeros() -> None:
    blocks = to_blocks(np.ones((2, 40), np.float32), Grid(4, 32))
    assert blocks.shape == (2, 2, 32)
    assert blocks[:, 1, 8:].sum() == 0
