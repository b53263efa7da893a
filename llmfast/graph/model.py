"""An ONNX model on disk: the graph in memory, the weights read one at a time through a memory map."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from llmfast.errors import InputError
from llmfast.files import locate, open_located
from llmfast.graph.guard import MAX_RANK, check_graph, check_head, check_versions, explain, standard_opset
from llmfast.graph.skeleton import read_skeleton

# What may be said of external data; `checksum` is in the specification, and nobody checks it.
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum", "basepath"}
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATS = (TensorProto.FLOAT, *HALVES)
# Tables of positions are stored for speed; nobody trained them.
COMPUTED_PREFIXES = ("rotary.", "computed.")


@dataclass
class OnnxModel:
    """A parsed graph and the folder its external weights lie in.

    Attributes:
        proto: the model; tensors with external data hold a reference, not bytes.
        path: the `.onnx` file.
    """

    proto: onnx.ModelProto
    path: Path

    @classmethod
    def load(cls, path: Path, any_opset: bool = False) -> "OnnxModel":
        """Parse a graph and check that every external weight is where it should be, without reading it.

        Args:
            path: the `.onnx` file.
            any_opset: take graphs of old opsets and unknown operators too, which are only looked at.

        Raises:
            InputError: missing, empty, truncated or malformed file; external data missing or too short.
            UnsafeInputError: external data outside the model's folder.
            UnsupportedError: an opset or operators that this program does not handle.
            ResourceError: constants that would not fit into memory.
        """
        model = cls(_parse(path), path)
        _check(model.proto, path, any_opset)
        return model

    @property
    def opset(self) -> int:
        """Version of the standard operator set, 0 when the model imports none."""
        return standard_opset(self.proto)

    @cached_property
    def initializers(self) -> dict[str, TensorProto]:
        """Constant tensors by name."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

    def rank(self, name: str) -> int | None:
        """Return how many axes a value has, None where the graph does not state it."""
        graph = self.proto.graph
        stated = (value for value in (*graph.input, *graph.value_info) if value.name == name)
        shapes = (value.type.tensor_type.shape for value in stated if value.type.tensor_type.HasField("shape"))
        return next((len(shape.dim) for shape in shapes), None)

    @property
    def data_files(self) -> list[str]:
        """Names, relative to the graph's folder, of the files that hold its external weights."""
        return sorted({_external(tensor)[0] for tensor in self.proto.graph.initializer if _is_external(tensor)})

    def state(self) -> dict[Path, tuple[int, int, int]]:
        """Return size, time and number of the graph's file and its data: others when somebody writes or replaces it."""
        states = {file: file.stat() for file in (self.path, *(self.path.parent / name for name in self.data_files))}
        return {file: (state.st_size, state.st_mtime_ns, state.st_ino) for file, state in states.items()}

    def require_unchanged(self, before: Mapping[Path, tuple[int, int, int]]) -> None:
        """Refuse to go on when a file is not as `state` saw it.

        Raises:
            InputError: the message names the file.
        """
        for file, state in self.state().items():
            if before.get(file) != state:
                raise InputError(f"`{file}` changed while it was read", "wait until it is written, and run again")

    def read(self, tensor: TensorProto) -> np.ndarray:
        """Return a tensor's values; external ones are a read-only memory map."""
        return read_tensor(tensor, self.path.parent)


def count_parameters(models: Iterable[OnnxModel]) -> int:
    """Count the trained values of a bundle's graphs, as far as a graph tells them from tables; a code is one value."""
    models = list(models)
    made_from = {node.output[0]: node.input[0] for model in models for node in model.proto.graph.node if node.input}
    packed = {
        node.input[1]: (node, math.prod(attribute.i for attribute in node.attribute if attribute.name in ("K", "N")))
        for model in models
        for node in model.proto.graph.node
        if node.op_type == "MatMulNBits"
    }
    scales = {name for node, _ in packed.values() for name in node.input[2:4]}
    scales |= {made_from[name] for name in scales if name in made_from}  # behind a Cast
    floats = [tensor for tensor in _weights(models) if tensor.data_type in FLOATS and tensor.name not in scales]
    counts = [*(math.prod(tensor.dims) for tensor in floats), *(count for _, count in packed.values())]
    return sum(map(int, counts))


def count_weight_bytes(models: Iterable[OnnxModel]) -> int:
    """Count the stored bytes of all weights, scales and zero points included."""
    return sum(tensor_bytes(tensor) for tensor in _weights(models))


def count_zeros(models: Iterable[OnnxModel]) -> int:
    """Count the zeros among the trained values that are stored as floats; what graphs share once."""
    arrays = (model.read(tensor) for model, tensor in _owned_weights(models) if tensor.data_type in FLOATS)
    return sum(int(array.size - np.count_nonzero(array)) for array in arrays)


def _weights(models: Iterable[OnnxModel]) -> Iterator[TensorProto]:
    return (tensor for _, tensor in _owned_weights(models))


def _owned_weights(models: Iterable[OnnxModel]) -> Iterator[tuple[OnnxModel, TensorProto]]:
    """Yield the weights of a bundle's graphs, each with a graph that has it; what they share once."""
    seen = set()
    for model in models:
        for tensor in model.proto.graph.initializer:
            place = tuple((entry.key, entry.value) for entry in tensor.external_data)
            if tensor.name.startswith(COMPUTED_PREFIXES) or (place and (tensor.name, place) in seen):
                continue
            seen.add((tensor.name, place))
            yield model, tensor


def walk(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of a graph, those inside subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from walk(attribute.g)


def reads(node: onnx.NodeProto) -> list[str]:
    """Return the values that a node, or a node inside its subgraphs, reads."""
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return [*node.input, *(name for graph in inner for part in walk(graph) for name in part.input)]


def live_nodes(
    graph: onnx.GraphProto, needs: Callable[[onnx.NodeProto], Iterable[str]] = reads
) -> list[onnx.NodeProto]:
    """Return the nodes that the graph's outputs depend on, in order.

    Args:
        graph: its nodes are in topological order, as ONNX demands.
        needs: the values that a node needs; fewer than it reads where it is going to be replaced.
    """
    needed = {output.name for output in graph.output}
    live = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(needs(node))
    return live[::-1]


def read_tensor(tensor: TensorProto, folder: Path) -> np.ndarray:
    """Return a tensor's values, reading external data below `folder` through a memory map."""
    if not _is_external(tensor):
        try:
            inline: np.ndarray = onnx.numpy_helper.to_array(tensor)
        except (TypeError, ValueError) as error:
            raise InputError(f"malformed tensor `{tensor.name}`: {str(error)[:200]}") from error
        return inline
    location, offset, _ = _external(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    # Located anew: the file may have become a link since, or shorter.
    with open_located(folder, location, f"tensor `{tensor.name}`") as data:
        if offset + tensor_bytes(tensor) > os.fstat(data.fileno()).st_size:
            raise InputError(f"`{folder / location}` changed while it was read", "wait until it is written")
        return np.memmap(data, dtype, "r", offset, shape)


def tensor_bytes(tensor: TensorProto) -> int:
    """Return the bytes a tensor's values take."""
    four_bit = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4)
    bits = 4 if four_bit else 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    elements: int = math.prod(tensor.dims)
    return (elements * bits + 7) // 8


def check_file(path: Path) -> int:
    """Check a graph as `OnnxModel.load` does, without reading the values of its weights; return their bytes.

    Raises:
        LlmfastError: as `OnnxModel.load`.
    """
    proto = read_skeleton(path)
    _check(proto, path, any_opset=False)
    return sum(map(tensor_bytes, proto.graph.initializer))


def _parse(path: Path) -> onnx.ModelProto:
    check_head(path)
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise explain(error, path) from error
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error


def _check(proto: onnx.ModelProto, path: Path, any_opset: bool) -> None:
    check_versions(proto, path, any_opset)
    check_graph(proto, path, any_domain=any_opset)
    sizes: dict[str, int] = {}
    for tensor in proto.graph.initializer:
        _check_tensor(tensor, path, sizes)


def _is_external(tensor: TensorProto) -> bool:
    # What else it says of external data means nothing then, and nobody checks it.
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _external(tensor: TensorProto) -> tuple[str, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if unknown := sorted(entries.keys() - _EXTERNAL_KEYS):
        raise InputError(f"malformed external data of tensor `{tensor.name}`: unknown key `{unknown[0]}`")
    try:
        offset = int(entries.get("offset", 0))
        return entries["location"], offset, int(entries.get("length", tensor_bytes(tensor)))
    except (KeyError, ValueError) as error:
        raise InputError(f"malformed external data of tensor `{tensor.name}`: {error}") from error


def _check_tensor(tensor: TensorProto, model: Path, sizes: dict[str, int]) -> None:
    """Refuse a tensor that is not what it says; `sizes` are of the data files located so far, by location."""
    what = f"tensor `{tensor.name}` of `{model}`"
    if any(dim < 0 for dim in tensor.dims) or len(tensor.dims) > MAX_RANK:
        raise InputError(f"{what} has a negative dimension, or more than {MAX_RANK} of them")
    if tensor.data_type not in helper.get_all_tensor_dtypes():
        raise InputError(f"{what} has the unknown type {tensor.data_type}")
    if not _is_external(tensor):
        if tensor.HasField("raw_data") and len(tensor.raw_data) != tensor_bytes(tensor):
            raise InputError(f"{what} needs {tensor_bytes(tensor)} bytes, has {len(tensor.raw_data)}")
        return
    location, offset, length = _external(tensor)
    if location not in sizes:
        sizes[location] = locate(model.parent, location, what).stat().st_size
    size = sizes[location]
    if offset < 0 or length != tensor_bytes(tensor) or length > size or offset > size - length:
        raise InputError(
            f"external data `{model.parent / location}`: tensor `{tensor.name}` needs {tensor_bytes(tensor)} bytes at "
            f"{offset}, the file has {size}",
            "the file is truncated; copy or export it again",
        )
