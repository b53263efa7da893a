"""An ONNX model on disk: the graph in memory, the weights read one at a time through a memory map."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from llmfast.errors import InputError, UnsafeInputError, UnsupportedError

OLDEST_OPSET = 13
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATS = (TensorProto.FLOAT, *HALVES)
# Tables of positions are stored for speed; nobody trained them.
COMPUTED_PREFIXES = ("rotary.", "computed.")
GIT_LFS = b"version https://git-lfs.github.com/"


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
            any_opset: take graphs of old opsets too, which are only looked at.

        Raises:
            InputError: missing, empty, truncated or malformed file; external data missing or too short.
            UnsafeInputError: external data outside the model's folder.
            UnsupportedError: an opset this program does not handle.
        """
        model = cls(_parse(path), path)
        opset = model.opset
        if opset < OLDEST_OPSET and not any_opset:
            raise UnsupportedError(
                f"`{path}` uses opset {opset}, llmfast needs {OLDEST_OPSET} or newer",
                "upgrade it with onnx.version_converter",
            )
        if not model.proto.graph.node:
            raise InputError(f"no graph in `{path}`", "the file is empty or truncated")
        for tensor in model.proto.graph.initializer:
            _check_tensor(tensor, path)
        return model

    @property
    def opset(self) -> int:
        """Version of the standard operator set, 0 when the model imports none."""
        return max((entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)

    @cached_property
    def initializers(self) -> dict[str, TensorProto]:
        """Constant tensors by name."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

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
    if not tensor.HasField("data_location") or tensor.data_location != TensorProto.EXTERNAL:
        inline: np.ndarray = onnx.numpy_helper.to_array(tensor)
        return inline
    location, offset, _ = _external(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    return np.memmap(folder / location, dtype, "r", offset, shape)


def tensor_bytes(tensor: TensorProto) -> int:
    """Return the bytes a tensor's values take."""
    four_bit = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4)
    bits = 4 if four_bit else 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    elements: int = math.prod(tensor.dims)
    return (elements * bits + 7) // 8


def _parse(path: Path) -> onnx.ModelProto:
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if not head:
            raise InputError(f"empty file: `{path}`", "download or export it again")
        if head.startswith(GIT_LFS):
            raise InputError(f"Git LFS pointer, not the model: `{path}`", "run `git lfs pull`")
        if head.lstrip()[:1] in (b"<", b"{"):
            raise InputError(f"looks like HTML or JSON, not ONNX: `{path}`", "download it again")
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"truncated or corrupt ONNX: `{path}`", "download or export it again") from error
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error


def _external(tensor: TensorProto) -> tuple[str, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(entries.get("offset", 0))
        return entries["location"], offset, int(entries.get("length", tensor_bytes(tensor)))
    except (KeyError, ValueError) as error:
        raise InputError(f"malformed external data of tensor `{tensor.name}`: {error}") from error


def _check_tensor(tensor: TensorProto, model: Path) -> None:
    if any(dim < 0 for dim in tensor.dims):
        raise InputError(f"tensor `{tensor.name}` of `{model}` has a negative dimension")
    if tensor.data_location != TensorProto.EXTERNAL:
        if tensor.HasField("raw_data") and len(tensor.raw_data) != tensor_bytes(tensor):
            raise InputError(
                f"tensor `{tensor.name}` of `{model}` needs {tensor_bytes(tensor)} bytes, has {len(tensor.raw_data)}"
            )
        return
    location, offset, length = _external(tensor)
    parts = Path(location).parts
    if not parts or Path(location).is_absolute() or ".." in parts or "\\" in location or "\0" in location:
        raise UnsafeInputError(f"tensor `{tensor.name}` of `{model}` points outside its folder: `{location!r}`")
    data = model.parent / location
    if not data.is_file():
        raise InputError(
            f"external data missing: `{data}` (first needed by tensor `{tensor.name}`)",
            "copy the data file beside the .onnx file",
        )
    size = data.stat().st_size
    if offset < 0 or length != tensor_bytes(tensor) or length > size or offset > size - length:
        raise InputError(
            f"external data `{data}`: tensor `{tensor.name}` needs {tensor_bytes(tensor)} bytes at {offset}, "
            f"the file has {size}",
            "the file is truncated; copy or export it again",
        )
