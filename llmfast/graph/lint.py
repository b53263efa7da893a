"""Slow, lossy and wasteful forms in a graph: a table of rules, each with its reason and its remedy.

What is said of kernels holds for ONNX Runtime's CPU provider; the factors were measured with onnxruntime 1.31 and 1.32
on x86 with AVX512-VNNI. Weights are not read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from llmfast.graph.model import FLOATS, OnnxModel, count_weight_bytes, tensor_bytes
from llmfast.graph.packed import ACCURACY_INT8, BLOCK_SIZES
from llmfast.graph.view import GraphView, attribute, input_at

_INTEGER_MATMULS = {"MatMulInteger": (0, 1), "MatMulIntegerToFloat": (0, 1), "QLinearMatMul": (0, 3)}
_MATMULS = ("MatMul", "Gemm", "FusedMatMul")


@dataclass(frozen=True)
class Rule:
    """One form to look for.

    Attributes:
        name: short, with dashes.
        affects: `speed`, `quality` or `size`.
        reason: what it costs.
        remedy: what to do about it.
        find: yields the nodes that have the form.
    """

    name: str
    affects: str
    reason: str
    remedy: str
    find: Callable[[GraphView], Iterable[onnx.NodeProto]]


@dataclass(frozen=True)
class Finding:
    """A rule that found something.

    Attributes:
        rule: what was found, and why it matters.
        nodes: names of the nodes, or of their outputs where they have none.
    """

    rule: Rule
    nodes: tuple[str, ...]


def lint(model: OnnxModel) -> list[Finding]:
    """Return what the rules find in a graph, in the order of `RULES`."""
    view = GraphView(model)
    found = []
    for rule in RULES:
        nodes = {id(node): node.name or node.output[0] for node in rule.find(view)}
        if nodes:
            found.append(Finding(rule, tuple(nodes.values())))
    return found


def _nbits(view: GraphView) -> Iterator[onnx.NodeProto]:
    return view.of_type("MatMulNBits")


def _low_accuracy(view: GraphView) -> Iterator[onnx.NodeProto]:
    return (node for node in _nbits(view) if attribute(node, "accuracy_level", 0) != ACCURACY_INT8)


def _odd_blocks(view: GraphView) -> Iterator[onnx.NodeProto]:
    for node in _nbits(view):
        if attribute(node, "block_size", 0) not in BLOCK_SIZES.get(attribute(node, "bits", 4), ()):
            yield node


def _reordered(view: GraphView) -> Iterator[onnx.NodeProto]:
    return (node for node in _nbits(view) if input_at(node, 4))


def _float_zero_points(view: GraphView) -> Iterator[onnx.NodeProto]:
    return (node for node in _nbits(view) if input_at(node, 3) and view.type_of(node.input[3]) in FLOATS)


def _unfit_signs(view: GraphView) -> Iterator[onnx.NodeProto]:
    for node in view.of_type(*_INTEGER_MATMULS):
        activations, weights = _INTEGER_MATMULS[node.op_type]
        signed_activations = view.type_of(node.input[activations]) == TensorProto.INT8
        unsigned_weights = view.type_of(view.origin(node.input[weights])) == TensorProto.UINT8
        if signed_activations or unsigned_weights:
            yield node
    for node in view.of_type("DynamicQuantizeMatMul"):
        if view.type_of(node.input[1]) == TensorProto.UINT8:
            yield node


def _saturating(view: GraphView) -> Iterator[onnx.NodeProto]:
    for node in view.of_type("QLinearMatMul"):
        if view.type_of(view.origin(node.input[3])) == TensorProto.INT8:
            yield node


def _scale_per_tensor(view: GraphView) -> Iterator[onnx.NodeProto]:
    return view.of_type("DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def _dequantized_weights(view: GraphView) -> Iterator[onnx.NodeProto]:
    for node in view.of_type(*_MATMULS):
        weight = view.maker(view.origin(input_at(node, 1)), "DequantizeLinear")
        if weight is not None and view.origin(weight.input[0]) in view.model.initializers:
            is_integer = view.maker(node.input[0], "DequantizeLinear") is not None
            four_bit = view.type_of(view.origin(weight.input[0])) in (TensorProto.INT4, TensorProto.UINT4)
            if not is_integer and not four_bit:
                yield node


def _blocks_left_to_the_runtime(view: GraphView) -> Iterator[onnx.NodeProto]:
    for node in view.of_type("MatMul"):
        weight = view.maker(view.origin(node.input[1]), "DequantizeLinear")
        if weight is not None and view.type_of(view.origin(weight.input[0])) in (TensorProto.INT4, TensorProto.UINT4):
            yield node


def _lone_half(view: GraphView) -> Iterator[onnx.NodeProto]:
    for node in view.of_type(*_MATMULS):
        # A weight behind a Cast is widened once; float16 between Casts ONNX Runtime computes in float32 by itself.
        between_casts = view.maker(input_at(node, 0), "Cast") is not None and all(
            reader.op_type == "Cast" for reader in view.readers[node.output[0]]
        )
        dtype = view.type_of(input_at(node, 1))
        if dtype == TensorProto.BFLOAT16 or (dtype == TensorProto.FLOAT16 and not between_casts):
            yield node


def _growing_cache(view: GraphView) -> Iterator[onnx.NodeProto]:
    past = {value.name for value in view.model.proto.graph.input if value.name.startswith("past")}
    for node in view.of_type("Concat"):
        if past & {view.origin(name) for name in node.input}:
            yield node


def _nan_checks(view: GraphView) -> Iterator[onnx.NodeProto]:
    return (node for node in view.of_type("IsNaN") if view.maker(node.input[0], "Softmax") is not None)


def _reciprocal_norms(view: GraphView) -> Iterator[onnx.NodeProto]:
    """Find 1 / sqrt(mean + epsilon) as Reciprocal, in place of a division by the root."""
    for node in view.of_type("Reciprocal"):
        root = view.maker(node.input[0], "Sqrt")
        total = view.maker(root.input[0], "Add") if root is not None else None
        if total is not None and any(view.maker(name, "ReduceMean") is not None for name in total.input):
            yield node


def _tanh_gelus(view: GraphView) -> Iterator[onnx.NodeProto]:
    """Find 0.5 x (1 + tanh(k (x + c x^3))): a Tanh of a scaled sum whose result goes through Add and Mul."""
    for node in view.of_type("Tanh"):
        scaled = view.maker(node.input[0], "Mul")
        cubed = scaled is not None and any(view.maker(name, "Add") is not None for name in scaled.input)
        sums = [reader for reader in view.readers[node.output[0]] if reader.op_type == "Add"]
        if cubed and any(reader.op_type == "Mul" for one in sums for reader in view.readers[one.output[0]]):
            yield node


def _logits_everywhere(view: GraphView) -> Iterator[onnx.NodeProto]:
    """Find the head of a decoder with a cache that multiplies every position of the prompt."""
    if not any(value.name.startswith("past") for value in view.model.proto.graph.input):
        return
    name = "logits"
    for _ in range(8):  # from the head back to its norm, and the sum before it
        maker = view.producers.get(name)
        if maker is None or maker.op_type in ("Slice", "Gather", "GatherND", "GatherElements"):
            return
        # Past weights and constants, which a norm may multiply first.
        name = next((one for one in maker.input if one in view.producers and view.producers[one].input), "")
    yield view.producers["logits"]


def _float_tables(view: GraphView) -> Iterator[onnx.NodeProto]:
    """Find a table of floats that holds a quarter of the bytes of a graph whose layers are quantized."""
    if not any(True for _ in view.of_type("MatMulNBits", *_INTEGER_MATMULS, "DynamicQuantizeMatMul")):
        return
    total = count_weight_bytes([view.model])
    for node in view.of_type("Gather"):
        table = view.model.initializers.get(node.input[0])
        if table is not None and table.data_type in FLOATS and 4 * tensor_bytes(table) > total:
            yield node


_QUANTIZE_AGAIN = "quantize the float model again with llmfast"
RULES = (
    Rule(
        "nbits-accuracy-level",
        "speed",
        "MatMulNBits without accuracy_level 4 computes in float32: 2 to 3 times slower at 4 bits, and at 2 and 8 bits, "
        "where no such kernel exists, it expands the whole weight on every call",
        f"set the attribute accuracy_level to 4, or {_QUANTIZE_AGAIN}",
        _low_accuracy,
    ),
    Rule(
        "nbits-block-size",
        "speed",
        "MatMulNBits has no kernel for this block size: the weight is expanded on every call, or refused",
        f"{_QUANTIZE_AGAIN}: --set block_size=32 or 128",
        _odd_blocks,
    ),
    Rule(
        "nbits-group-index",
        "speed",
        "MatMulNBits with g_idx (GPTQ's act-order) expands the whole weight on every call, 60 times slower and more",
        "quantize with static groups (desc_act false): llmfast quantize --method gptq does",
        _reordered,
    ),
    Rule(
        "nbits-float-zero-point",
        "speed",
        "MatMulNBits with zero points of floats (HQQ) expands the whole weight on every call, 60 times slower and more",
        "store zero points as uint8",
        _float_zero_points,
    ),
    Rule(
        "integer-signs",
        "speed",
        "the fast integer kernel multiplies unsigned activations by signed weights; this one is up to 2.7 times slower",
        "uint8 activations, int8 weights: llmfast quantize --scheme int8",
        _unfit_signs,
    ),
    Rule(
        "saturating-product",
        "quality",
        "QLinearMatMul with int8 weights saturates on x86 processors without VNNI; for the other integer products "
        "ONNX Runtime has a switch, which llmfast sets there",
        f"{_QUANTIZE_AGAIN}, or write it as QuantizeLinear and DequantizeLinear around MatMul",
        _saturating,
    ),
    Rule(
        "activations-per-tensor",
        "quality",
        "one scale for a whole tensor of activations: an outlier in one token costs every other token its precision, "
        "and an answer depends on what it is batched with",
        "one scale per token: llmfast quantize --scheme int8",
        _scale_per_tensor,
    ),
    Rule(
        "dequantized-weight",
        "speed",
        "the weight is turned back into float32 before it is multiplied: smaller on disk, neither faster nor smaller "
        "in memory",
        "quantize the float model with a scheme that has a kernel: int8, int4",
        _dequantized_weights,
    ),
    Rule(
        "blocks-as-dequantize",
        "speed",
        "ONNX Runtime makes MatMulNBits of this as it loads the model, at an accuracy level that computes in float32",
        f"set session.qdq_matmulnbits_accuracy_level to 4, or {_QUANTIZE_AGAIN}",
        _blocks_left_to_the_runtime,
    ),
    Rule(
        "half-on-cpu",
        "speed",
        "no CPU kernel multiplies float16 or bfloat16: weights and activations are cast to float32 and back",
        "run it on a GPU, or use float32, int8 or int4 on the CPU",
        _lone_half,
    ),
    Rule(
        "growing-cache",
        "speed",
        "Concat copies the whole KV cache for every token",
        "export the checkpoint with llmfast: its cache is one buffer, written in place",
        _growing_cache,
    ),
    Rule(
        "nan-check",
        "speed",
        "IsNaN and Where run over every attention score, for rows that may look at nothing",
        'load the PyTorch model with attn_implementation="eager", or export it with llmfast',
        _nan_checks,
    ),
    Rule(
        "norm-by-reciprocal",
        "speed",
        "ONNX Runtime fuses a norm that divides by the root, not one that multiplies by its Reciprocal: six passes "
        "over the activations where one would do",
        "export LayerNormalization (opset 17) or RMSNormalization (opset 23), or write x / sqrt(...)",
        _reciprocal_norms,
    ),
    Rule(
        "gelu-by-tanh",
        "speed",
        "ONNX Runtime leaves GELU's tanh approximation as eight nodes",
        'export Gelu(approximate="tanh") with opset 20',
        _tanh_gelus,
    ),
    Rule(
        "logits-everywhere",
        "speed",
        "the head runs for every position of the prompt, although only the last one is sampled from",
        "export the checkpoint with llmfast: its graph has an input num_logits",
        _logits_everywhere,
    ),
    Rule(
        "float-table",
        "size",
        "an embedding of floats holds over a quarter of the bytes of a quantized model",
        f"{_QUANTIZE_AGAIN}, which stores it in 8-bit blocks",
        _float_tables,
    ),
)
