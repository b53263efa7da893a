"""What a graph may ask for, checked before ONNX Runtime sees it: native code crashes or hangs on what passes here not.

Every check is linear in the size of the graph. The classes of malformed graphs are those that are known to crash or
exhaust ONNX Runtime when a session is created; https://github.com/microsoft/onnxruntime/issues has one or more of each.
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import onnx
from onnx import helper

from llmfast.errors import InputError, ResourceError, UnsupportedError
from llmfast.files import GIT_LFS, open_regular

OLDEST_OPSET = 13
MAX_PROTO_BYTES = 2**31 - 1
MAX_NODES = 1_000_000
MAX_DEPTH = 16  # of graphs within graphs
MAX_FUNCTIONS = 4096
MAX_CALL_DEPTH = 64
MAX_BLOCKSIZE = 1024
MAX_RANK = 8
# What nodes may make of constants alone, as ONNX Runtime does when it loads a model.
MAX_CONSTANT_BYTES = 256 << 20
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
_POSITIVE = ("strides", "dilations", "kernel_shape")
# The operators of ONNX Runtime that llmfast looks into: fewest inputs, attributes that must be there.
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
_CONTRIB_NEEDS = {
    "DynamicQuantizeMatMul": (3, frozenset[str]()),
    "GatherBlockQuantized": (3, frozenset[str]()),
    "GroupQueryAttention": (7, frozenset({"num_heads", "kv_num_heads"})),
    "MatMulInteger16": (2, frozenset[str]()),
    "MatMulIntegerToFloat": (4, frozenset[str]()),
    "MatMulNBits": (3, frozenset({"K", "N"})),
    "MultiHeadAttention": (1, frozenset({"num_heads"})),
    "QMoE": (3, frozenset({"k"})),
    "MoE": (3, frozenset({"k"})),
    "RotaryEmbedding": (4, frozenset[str]()),
    "SimplifiedLayerNormalization": (2, frozenset[str]()),
    "SkipLayerNormalization": (3, frozenset[str]()),
    "SkipSimplifiedLayerNormalization": (3, frozenset[str]()),
}
_GROWING = ("ConstantOfShape", "Expand", "Range", "Tile")
_AGAIN = "download or export it again"


def check_head(path: Path) -> None:
    """Refuse what is no ONNX file by its first bytes, or too large for one.

    Raises:
        InputError: empty, a Git LFS pointer, HTML or JSON, or more than a protobuf can hold.
        UnsafeInputError: no regular file.
    """
    with open_regular(path) as file:
        head = file.read(512)
        size = file.seek(0, 2)
    if not head:
        raise InputError(f"empty file: `{path}`", _AGAIN)
    if head.startswith(GIT_LFS):
        raise InputError(f"Git LFS pointer, not the model: `{path}`", "run `git lfs pull`")
    if head.lstrip()[:1] in (b"<", b"{"):
        raise InputError(f"looks like HTML or JSON, not ONNX: `{path}`", "download it again")
    if size > MAX_PROTO_BYTES:
        raise InputError(f"`{path}` is over the 2 GiB protobuf limit", "store its weights as external data")


def explain(error: Exception, path: Path) -> InputError:
    """Return the error for a file that protobuf can't parse."""
    if "MaxDepth" in str(error):
        return InputError(f"nesting too deep: `{path}`", f"graphs may lie in graphs {MAX_DEPTH} times")
    return InputError(f"truncated or corrupt ONNX: `{path}`", _AGAIN)


def check_versions(model: onnx.ModelProto, path: Path, any_opset: bool = False) -> None:
    """Refuse a graph of a version that this program does not handle.

    Raises:
        InputError: no graph.
        UnsupportedError: older or newer than what is supported.
    """
    if not model.graph.node:
        raise InputError(f"no graph in `{path}`", "the file is empty or truncated")
    if model.ir_version > onnx.IR_VERSION:
        raise UnsupportedError(
            f"`{path}` has ir_version {model.ir_version}, this onnx knows {onnx.IR_VERSION} at most",
            "upgrade onnx and onnxruntime",
        )
    opset = standard_opset(model)
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UnsupportedError(f"`{path}` uses opset {opset}, this onnx knows {newest} at most", "upgrade onnx")
    if opset < OLDEST_OPSET and not any_opset:
        raise UnsupportedError(
            f"`{path}` uses opset {opset}, llmfast needs {OLDEST_OPSET} or newer",
            "upgrade it with onnx.version_converter",
        )


def standard_opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operator set, 0 when the model imports none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def check_graph(model: onnx.ModelProto, path: Path, any_domain: bool = False) -> None:
    """Refuse a graph that is malformed, or made to exhaust who loads it.

    Args:
        model: the graph; initializers may lack their values.
        path: its file, for messages.
        any_domain: take operators that nobody here knows too: the graph is only looked at.

    Raises:
        InputError: nested too deep, recursive, cyclic, dangling, or with attributes out of range.
        UnsupportedError: an operator of an unknown domain.
        ResourceError: constants that would not fit into memory.
    """
    _check_names(model, path)
    functions = {(function.domain, function.name): function for function in model.functions}
    if len(model.functions) > MAX_FUNCTIONS:
        raise InputError(f"`{path}` has {len(model.functions)} functions, at most {MAX_FUNCTIONS} are taken")
    _check_calls(functions, path)
    opset = standard_opset(model)
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    for count, node in enumerate(node for body in bodies for node in _walk(body, path)):
        if count >= MAX_NODES:
            raise InputError(f"`{path}` has more than {MAX_NODES:,} nodes")
        function = functions.get((node.domain, node.op_type))
        if function is not None:
            _check_call(node, function, path)
        elif node.domain not in _DOMAINS and not any_domain:
            raise UnsupportedError(f"`{path}` has a {node.op_type} of the unknown domain `{node.domain}`")
        _check_attributes(node, path)
        _check_arity(node, opset, path)
    _check_constants(model.graph, path)
    _check_order(model.graph, set(), path)


def _check_names(model: onnx.ModelProto, path: Path) -> None:
    """Refuse names that are not UTF-8, which protobuf gives as bytes."""
    graph = model.graph
    bodies = [graph.node, *(function.node for function in model.functions)]
    found: list[str | bytes] = [
        model.producer_name,
        model.producer_version,
        *(one.domain for one in model.opset_import),
    ]
    for function in model.functions:
        found += [function.name, function.domain, *function.input, *function.output]
    for value in (*graph.input, *graph.output, *graph.value_info):
        found += [value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim)]
    for tensor in graph.initializer:
        found.append(tensor.name)
        found += [text for entry in tensor.external_data for text in (entry.key, entry.value)]
    for node in (node for body in bodies for node in _walk(body, path)):
        found += [node.name, node.op_type, node.domain, *node.input, *node.output]
        found += [attribute.name for attribute in node.attribute]
    wrong = next((name for name in found if isinstance(name, bytes)), None)
    if wrong is not None:
        raise InputError(f"truncated or corrupt ONNX: `{path}`: the name {wrong!r:.100} is not UTF-8", _AGAIN)


def _walk(nodes: Iterable[onnx.NodeProto], path: Path) -> Iterator[onnx.NodeProto]:
    """Yield nodes and those of their subgraphs, without recursion."""
    left = [(iter(nodes), 1)]
    while left:
        rest, depth = left[-1]
        node = next(rest, None)
        if node is None:
            left.pop()
            continue
        yield node
        for graph in subgraphs(node):
            if depth >= MAX_DEPTH:
                raise InputError(f"nesting too deep: `{path}`", f"graphs may lie in graphs {MAX_DEPTH} times")
            left.append((iter(graph.node), depth + 1))


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs that a node holds."""
    found = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found + [graph for attribute in node.attribute for graph in attribute.graphs]


def _check_calls(functions: dict[tuple[str, str], onnx.FunctionProto], path: Path) -> None:
    """Refuse functions that call themselves, or each other too deep."""
    calls = {
        key: {
            (node.domain, node.op_type)
            for node in _walk(function.node, path)
            if (node.domain, node.op_type) in functions
        }
        for key, function in functions.items()
    }
    depth = 0
    while calls:  # leaves first; what never becomes a leaf is on a circle
        leaves = {key for key, called in calls.items() if not called & calls.keys()}
        if not leaves:
            raise InputError(f"recursive function: `{path}`: `{next(iter(calls))[1]}` calls itself")
        depth += 1
        if depth > MAX_CALL_DEPTH:
            raise InputError(f"nesting too deep: `{path}`: functions call each other {MAX_CALL_DEPTH} times and more")
        for key in leaves:
            del calls[key]


def _check_call(node: onnx.NodeProto, function: onnx.FunctionProto, path: Path) -> None:
    if len(node.input) > len(function.input) or len(node.output) > len(function.output):
        raise InputError(
            f"{_name(node)} of `{path}` has {len(node.input)} inputs and {len(node.output)} outputs, "
            f"its function has {len(function.input)} and {len(function.output)}"
        )


def _check_attributes(node: onnx.NodeProto, path: Path) -> None:
    for attribute in node.attribute:
        if attribute.name in _POSITIVE and any(value < 1 for value in attribute.ints):
            raise InputError(f"{_name(node)} of `{path}`: `{attribute.name}` is {list(attribute.ints)[:8]}")
        if attribute.name == "blocksize" and not 1 <= attribute.i <= MAX_BLOCKSIZE:
            raise InputError(f"{_name(node)} of `{path}`: `blocksize` is {attribute.i}, at most {MAX_BLOCKSIZE}")


def _check_arity(node: onnx.NodeProto, opset: int, path: Path) -> None:
    """Refuse a node that lacks inputs, outputs or attributes that its operator must have."""
    inputs, attributes = _needs(node.op_type, node.domain, opset)
    if len(node.input) < inputs or not node.output:
        raise InputError(f"{_name(node)} of `{path}` has {len(node.input)} inputs and {len(node.output)} outputs")
    if missing := attributes - {attribute.name for attribute in node.attribute}:
        raise InputError(f"{_name(node)} of `{path}` lacks the attribute `{min(missing)}`")


@lru_cache(4096)
def _needs(operator: str, domain: str, opset: int) -> tuple[int, frozenset[str]]:
    """Return the fewest inputs of an operator, and the attributes that it must have."""
    if domain == "com.microsoft":
        return _CONTRIB_NEEDS.get(operator, (0, frozenset()))
    try:
        schema = onnx.defs.get_schema(operator, max(opset, 1), "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:  # ONNX Runtime says so when it does not know it either
        return 0, frozenset()
    return schema.min_input, frozenset(name for name, one in schema.attributes.items() if one.required)


def _check_order(graph: onnx.GraphProto, outer: set[str], path: Path) -> None:
    """Refuse a value that is made twice, or read before it is made; the depth of graphs is checked before."""
    initializers = [tensor.name for tensor in graph.initializer]
    initializers += [tensor.values.name for tensor in graph.sparse_initializer]
    if len(set(initializers)) != len(initializers):
        twice = next(name for name in initializers if initializers.count(name) > 1)
        raise InputError(f"initializer `{twice}` of `{path}` is there twice")
    known = outer | set(initializers) | {value.name for value in graph.input}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise InputError(
                    f"{_name(node)} of `{path}` reads `{name}`, which nothing made before",
                    "the graph is cyclic, not sorted, or lacks a part",
                )
        for inner in subgraphs(node):
            _check_order(inner, known, path)
        for name in filter(None, node.output):
            if name in known and name not in outer:
                raise InputError(f"{_name(node)} of `{path}` makes `{name}`, which is there already")
            known.add(name)


def _check_constants(graph: onnx.GraphProto, path: Path) -> None:
    """Refuse nodes whose outputs follow from constants alone and are large: they are computed when the model loads."""
    constants: dict[str, onnx.TensorProto | None] = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            constants |= dict.fromkeys(
                node.output, next((part.t for part in node.attribute if part.HasField("t")), None)
            )
    total = 0
    for node in graph.node:
        if node.op_type in _GROWING:
            total += _constant_bytes(node, constants)
            if total > MAX_CONSTANT_BYTES:
                raise ResourceError(
                    f"constants of `{path}` would need {total / 2**30:.1f} GiB: {_name(node)} is one of them",
                    f"at most {MAX_CONSTANT_BYTES >> 20} MiB are taken",
                )


def _constant_bytes(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto | None]) -> int:
    """Return at least how many bytes a node makes of constants alone, 0 when it reads anything else."""
    values = [_integers(constants.get(name)) for name in node.input]
    if node.op_type == "Range" and len(values) == 3 and all(value and len(value) == 1 for value in values):
        start, stop, step = (value[0] for value in values)  # type: ignore[index]
        return 8 * max(0, (stop - start) // step) if step else 0
    shape = values[-1] if values else None
    if node.op_type == "Tile" and node.input:
        repeated = constants.get(node.input[0])
        return 4 * math.prod(map(abs, shape)) * math.prod(repeated.dims) if shape and repeated is not None else 0
    is_constant = node.op_type == "ConstantOfShape" or (node.op_type == "Expand" and node.input[0] in constants)
    return 4 * math.prod(map(abs, shape)) if shape and is_constant else 0


def _integers(tensor: onnx.TensorProto | None) -> list[int] | None:
    """Return the values of a small tensor of integers, None when it is none or its values are elsewhere."""
    is_integer = tensor is not None and tensor.data_type in (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    if tensor is None or not is_integer or math.prod(tensor.dims) > MAX_RANK:
        return None
    if tensor.HasField("raw_data"):
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        data = tensor.raw_data
        return [int.from_bytes(data[at : at + width], "little", signed=True) for at in range(0, len(data), width)]
    return list(tensor.int64_data or tensor.int32_data)


def _name(node: onnx.NodeProto) -> str:
    return f"node `{node.name or (node.output[0] if node.output else '')}` ({node.op_type})"
