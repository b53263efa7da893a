"""What a graph's weights are: which layer each belongs to, its role, its number format. Weights are not read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from llmfast.graph.linear import role_of
from llmfast.graph.model import COMPUTED_PREFIXES, FLOATS, tensor_bytes
from llmfast.graph.view import GraphView, attribute, input_at

_NAMES: dict[int, str] = {value: name.lower() for name, value in TensorProto.DataType.items()}
_BITS = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "int8": 8, "uint8": 8, "float16": 16, "bfloat16": 16}
# What exporters and quantizers append to a layer's name for its weight, its scales and its node.
_SUFFIX = re.compile(r"([._/]+(MatMul|Gemm|weights?|Q\d+\w*|quantized|q\d+|\d?bits?|Quant|b?float16))+$", re.IGNORECASE)
# Names that an exporter numbered say nothing; the node's says more.
_NUMBERED = re.compile(r"^(onnx::|val_|_v_|/?v?)?\w*?_?\d+$|^onnx::")
_MATMULS = ("MatMul", "Gemm", "FusedMatMul")
_NORMS = (
    *("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "SkipLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", "GroupNormalization", "BatchNormalization", "InstanceNormalization"),
)
# Operator -> the inputs that are its weight, its scales and indices, and its zero points.
_QUANTIZED = {
    "MatMulNBits": (1, (2, 4), 3),
    "MatMulIntegerToFloat": (1, (3,), 5),
    "MatMulInteger": (1, (), 3),
    "DynamicQuantizeMatMul": (1, (2,), 3),
    "QLinearMatMul": (3, (4,), 5),
    "GatherBlockQuantized": (0, (2,), 3),
}
# Zero points are read up to this; larger ones are stored because they are not zero.
_SMALL_BYTES = 1 << 16
FLOAT = "float32"


@dataclass(frozen=True)
class Layer:
    """A part of the model with weights.

    Attributes:
        name: as far as the graph tells.
        role: the last part of the name, or `embedding`, `norm`, `bias`, `convolution`, `position table`, `other`.
        num_parameters: trained values.
        tensors: names of what is stored for it; a tensor that two layers share belongs to the first.
        weights: number format, `float32` or `4 bit` for example.
        bits: width of a weight.
        block_size: input features that share a scale; 0 is one scale per output channel or for all, None no scale.
        symmetric: no zero points are stored; None where nothing is quantized.
        activations: how the layer's input is multiplied.
    """

    name: str
    role: str
    num_parameters: int
    tensors: tuple[str, ...]
    weights: str
    bits: int
    block_size: int | None = None
    symmetric: bool | None = None
    activations: str = FLOAT


def take_census(view: GraphView) -> list[Layer]:
    """Return the layers of a graph in its order; every weight is counted once."""
    seen: set[str] = set()
    layers = []
    for layer in (*_layers(view), *_others(view)):
        fresh = tuple(name for name in layer.tensors if name not in seen)
        if layer.tensors and layer.tensors[0] not in seen:
            layers.append(layer)
        seen.update(fresh)
    return layers


def dtype_name(data_type: int) -> str:
    """Return `float32`, `int8` and so on."""
    name = _NAMES.get(data_type, "undefined")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _layers(view: GraphView) -> Iterator[Layer]:
    for node in view.nodes:
        if node.op_type in _QUANTIZED:
            yield from _quantized(view, node)
        elif node.op_type in _MATMULS and len(node.input) > 1:
            yield from _multiplied(view, node, view.origin(node.input[1]))
        elif node.op_type == "Gather":
            yield from _looked_up(view, node)
        elif node.op_type in ("Conv", "ConvTranspose") and node.input[1] in view.model.initializers:
            yield _float(view, node, node.input[1], "convolution")
        elif node.op_type in _NORMS:
            for name in node.input[1:]:
                if name in view.model.initializers:
                    yield _float(view, node, name, "norm")


def _others(view: GraphView) -> Iterator[Layer]:
    """Yield the floats that no layer above holds; integers are shapes, axes and indices."""
    for name, tensor in view.model.initializers.items():
        if tensor.data_type in FLOATS and not name.startswith(COMPUTED_PREFIXES):
            readers = view.readers[name]
            is_bias = len(tensor.dims) == 1 and any(node.op_type in ("Add", "Gemm") for node in readers)
            yield Layer(name, "bias" if is_bias else "other", _size(tensor), (name,), dtype_name(tensor.data_type), 32)
        elif name.startswith(COMPUTED_PREFIXES):
            yield Layer(name, "position table", 0, (name,), dtype_name(tensor.data_type), 32)


def _quantized(view: GraphView, node: onnx.NodeProto) -> Iterator[Layer]:
    index, scales, zero_point = _QUANTIZED[node.op_type]
    weight = view.model.initializers.get(node.input[index])
    if weight is None:
        return
    names = [view.origin(input_at(node, place)) for place in (index, *scales, zero_point)]
    stored = tuple(dict.fromkeys(name for name in names if name in view.model.initializers))
    name, dtype = layer_name(node, weight.name), dtype_name(weight.data_type)
    bits, size, blocks = _BITS.get(dtype, 8), _size(weight), attribute(node, "block_size", 0)
    if node.op_type == "MatMulNBits":
        bits = attribute(node, "bits", 4)
        size = attribute(node, "N", 0) * attribute(node, "K", 0)
    elif node.op_type == "GatherBlockQuantized" and dtype == "uint8":  # codes side by side in bytes
        bits = attribute(node, "bits", 4)
        size = size * 8 // bits
    role = "embedding" if node.op_type == "GatherBlockQuantized" else role_of(name)
    symmetric = _is_symmetric(view, weight, input_at(node, zero_point), in_blocks=blocks > 0)
    yield Layer(name, role, size, stored, f"{bits} bit", bits, blocks, symmetric, _activations(view, node))


def _is_symmetric(view: GraphView, weight: TensorProto, zero_point: str, in_blocks: bool) -> bool:
    """Return whether zero is the middle of the codes: implied in blocks, and where signed codes have zero point 0."""
    is_signed = weight.data_type in (TensorProto.INT8, TensorProto.INT4)
    if not zero_point:
        return in_blocks or is_signed
    tensor = view.model.initializers.get(zero_point)
    if tensor is None or tensor_bytes(tensor) > _SMALL_BYTES:
        return False
    return is_signed and not view.model.read(tensor).astype(int).any()


def _looked_up(view: GraphView, node: onnx.NodeProto) -> Iterator[Layer]:
    """Find a table of floats, or of codes that are turned into floats before or after the look-up."""
    after = next((reader for reader in view.readers[node.output[0]] if reader.op_type == "DequantizeLinear"), None)
    source = view.maker(node.input[0], "DequantizeLinear") or after
    name = view.origin(node.input[0])
    table = view.model.initializers.get(name)
    if source is not None:
        codes = node.input[0] if source is after else view.origin(source.input[0])
        if codes in view.model.initializers:
            yield _dequantized(view, node, source, codes, "embedding", "-")
    elif table is not None and len(table.dims) == 2 and table.data_type in FLOATS:
        yield _float(view, node, name, "embedding")


def _multiplied(view: GraphView, node: onnx.NodeProto, weight: str) -> Iterator[Layer]:
    tensor = view.model.initializers.get(weight)
    if tensor is not None and len(tensor.dims) == 2 and tensor.data_type in FLOATS:
        yield _float(view, node, weight)
    source = view.maker(weight, "DequantizeLinear")
    codes = view.origin(source.input[0]) if source is not None else ""
    if source is not None and codes in view.model.initializers:
        integer = view.maker(node.input[0], "DequantizeLinear") is not None
        yield _dequantized(view, node, source, codes, "", "8 bit, static scale" if integer else FLOAT)


def _float(view: GraphView, node: onnx.NodeProto, weight: str, role: str = "") -> Layer:
    tensor = view.model.initializers[weight]
    name = layer_name(node, weight)
    dtype = dtype_name(tensor.data_type)
    bias = [name for name in node.input[2:3] if node.op_type in ("Gemm", "Conv") and name in view.model.initializers]
    cast = view.maker(node.input[0], "Cast") if not role else None
    activations = dtype_name(attribute(cast, "to", TensorProto.FLOAT)) if cast is not None else FLOAT
    size, bits = _size(tensor), _BITS.get(dtype, 32)
    return Layer(name, role or role_of(name), size, (weight, *bias), dtype, bits, activations=activations)


def _dequantized(
    view: GraphView, node: onnx.NodeProto, source: onnx.NodeProto, codes: str, role: str, activations: str
) -> Layer:
    weight = view.model.initializers[codes]
    bits = _BITS.get(dtype_name(weight.data_type), 8)
    stored = (codes, *(name for name in source.input[1:] if name in view.model.initializers))
    name = layer_name(node, codes)
    blocks = attribute(source, "block_size", 0)
    symmetric = _is_symmetric(view, weight, input_at(source, 2), in_blocks=False)
    form = f"{bits} bit"
    return Layer(name, role or role_of(name), _size(weight), stored, form, bits, blocks, symmetric, activations)


def _activations(view: GraphView, node: onnx.NodeProto) -> str:
    """Say how the input of a quantized layer is multiplied."""
    if node.op_type == "MatMulNBits":
        return "8 bit, in the kernel" if attribute(node, "accuracy_level", 0) == 4 else FLOAT
    if node.op_type == "GatherBlockQuantized":
        return "-"
    if node.op_type == "DynamicQuantizeMatMul" or view.maker(node.input[0], "DynamicQuantizeLinear"):
        return "8 bit, per tensor"
    quantizer = view.maker(node.input[0], "QuantizeLinear")
    if quantizer is None:
        return "8 bit"
    is_static = quantizer.input[1] in view.model.initializers
    divided = view.maker(quantizer.input[0], "Div")  # by a scale per row, before opset 21 knew blocks
    return "8 bit, static scale" if is_static and divided is None else "8 bit, per token"


def layer_name(node: onnx.NodeProto, weight: str) -> str:
    """Return a layer's name: its weight's without suffixes, the node's where weights are numbered."""
    name = _SUFFIX.sub("", weight)
    if name == weight and _NUMBERED.match(weight):
        name = _SUFFIX.sub("", node.name or node.output[0])
    return name.strip("/").replace("/", ".")


def _size(tensor: TensorProto) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size
