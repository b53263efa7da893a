"""Writing ONNX models: weights stream to one external-data file, the graphs that share it are saved last."""

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

# Tensors below this stay in the graph: ONNX Runtime reads shapes and axes there, and they are tiny.
INLINE_BYTES = 1024
# The whole model fits one file below this, which is easier to copy about.
SINGLE_FILE_BYTES = 64 << 20
# External tensors can be memory-mapped only from page boundaries.
ALIGNMENT = mmap.ALLOCATIONGRANULARITY

_ONNX_TYPES = {np.dtype(ml_dtypes.int4): TensorProto.INT4, np.dtype(ml_dtypes.uint4): TensorProto.UINT4}


class WeightFile:
    """Appends tensors to a data file, so that no more than one of them is in memory.

    The file is named after its content when the model is saved (`model.<sha8>.onnx.data`): a graph
    can never meet another model's weights. A tensor that two graphs have under the same name, an
    embedding for instance, is stored once.

    Args:
        folder: an empty staging directory.
        stem: file name of the graph without `.onnx`.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self._folder = folder
        self._stem = stem
        self._path = folder / f".{stem}.data"
        self._file: BinaryIO = self._path.open("wb")
        self._digest = hashlib.sha256()
        self._end = 0
        self._external: dict[tuple[str, bytes], TensorProto] = {}

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        """Store a tensor and return the initializer that stands for it in the graph."""
        array = np.asarray(array, order="C")
        if array.nbytes < INLINE_BYTES or array.dtype in _ONNX_TYPES:
            return onnx.numpy_helper.from_array(array, name)
        data = array.reshape(-1).view(np.uint8).data
        key = name, hashlib.sha256(data).digest()
        if key in self._external:
            return self._external[key]
        self._write(b"\0" * (-self._end % ALIGNMENT))
        tensor = TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        _set_external(tensor, location=self._path.name, offset=self._end, length=array.nbytes)
        self._write(data)
        self._external[key] = tensor
        return tensor

    def save(self, model: onnx.ModelProto) -> list[Path]:
        """Write the one graph beside its data and return the files.

        The model's initializers must be those that `add` returned, so that they are told the
        data file's final name. Small models get their weights moved inside the graph.
        """
        if self._end > SINGLE_FILE_BYTES:
            return self.save_all({self._stem: model})
        self._file.close()
        for tensor in _outside(model):
            _move_inside(tensor, self._path)
        self._path.unlink()
        graph_file = self._folder / f"{self._stem}.onnx"
        onnx.save(model, graph_file)
        return [graph_file]

    def save_all(self, models: Mapping[str, onnx.ModelProto]) -> list[Path]:
        """Write several graphs, file name without `.onnx` -> model, beside the data they share; return the files.

        The weights stay outside whatever their size: inside, shared ones would be stored twice.
        """
        self._file.close()
        data_file = self._folder / f"{self._stem}.{self._digest.hexdigest()[:8]}.onnx.data"
        self._path.rename(data_file)
        for name, model in models.items():
            for tensor in _outside(model):
                entries = {entry.key: entry.value for entry in tensor.external_data}
                _set_external(tensor, location=data_file.name, offset=entries["offset"], length=entries["length"])
            onnx.save(model, self._folder / f"{name}.onnx")
        return [*(self._folder / f"{name}.onnx" for name in models), data_file]

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._end += len(data)


def _outside(model: onnx.ModelProto) -> list[TensorProto]:
    """Return the tensors that lie in the data file; a small one of the same name in another graph does not."""
    return [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]


def _set_external(tensor: TensorProto, **entries: object) -> None:
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def _move_inside(tensor: TensorProto, data: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with data.open("rb") as file:
        file.seek(int(entries["offset"]))
        tensor.raw_data = file.read(int(entries["length"]))
    del tensor.external_data[:]
    tensor.ClearField("data_location")
