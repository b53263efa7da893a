"""Rows A: malformed files."""

import errno
import json
import os
import struct
import zipfile
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from llmfast.export.safetensors_file import SafetensorsFile
from llmfast.graph.weights import WeightFile
from tests import tiny_decoder
from tests.faults import graphs
from tests.faults.table import Place, fault, quantize
from tests.test_gguf_file import DAMAGED


def _export(source: Any, place: Place, *more: Any) -> list[Any]:
    return ["export", source, "-o", place.output, *more]


def _shape(name: str, *dims: int) -> TensorProto:
    return numpy_helper.from_array(np.array(dims, np.int64), name)


@fault("A1", 3, "not found", "nowhere", each={"quantize": "quantize", "infer": "infer", "export": "export"})
def missing(place: Place, command: str) -> list[Any]:
    path = place.folder / "nowhere"
    return ["infer", path, "-p", "x"] if command == "infer" else [command, path, "-o", place.output, *_scheme(command)]


def _scheme(command: str) -> list[str]:
    return ["--scheme", "int8"] if command == "quantize" else []


@fault("A1", 3, "no model in", "looked for")
def folder_without_a_model(place: Place) -> list[Any]:
    place.write("folder/readme.txt", "nothing here")
    return quantize(place.folder / "folder", place)


@fault("A2", 3, "cannot read", "Permission denied", "model.onnx")
def unreadable(place: Place) -> list[Any]:
    path = graphs.save(place.folder)
    # Root may read everything, so the kernel's answer is made here.
    opened = os.open

    def refuse(name: Any, *arguments: Any, **options: Any) -> int:
        if os.fspath(name) == os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return opened(name, *arguments, **options)

    place.patch.setattr(os, "open", refuse)
    return quantize(path, place)


@fault("A3", 3, "empty file", "model.onnx")
def empty_onnx(place: Place) -> list[Any]:
    return quantize(place.write("model.onnx", b""), place)


_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@fault("A4", 3, "Git LFS pointer", "git lfs pull", each={"onnx": "onnx", "gguf": "gguf", "safetensors": "safetensors"})
def git_lfs_pointer(place: Place, kind: str) -> list[Any]:
    return _in_place_of_weights(place, kind, _POINTER)


@fault("A4", 3, "Git LFS pointer", "tokenizer.json")
def git_lfs_pointer_of_a_tokenizer(place: Place) -> list[Any]:
    model = place.own(place.decoder)
    manifest = json.loads((model / "llmfast.json").read_text())
    (model / "tokenizer.json").write_text(_POINTER)
    manifest["files"]["tokenizer.json"]["bytes"] = len(_POINTER)
    (model / "llmfast.json").write_text(json.dumps(manifest))
    return ["infer", model, "-p", "x"]


@fault("A5", 3, "HTML", each={"onnx": "onnx", "safetensors": "safetensors"})
def error_page(place: Place, kind: str) -> list[Any]:
    return _in_place_of_weights(place, kind, "<!DOCTYPE html><html>404</html>")


@fault("A5", 3, "not a GGUF file")
def error_page_as_gguf(place: Place) -> list[Any]:
    return _in_place_of_weights(place, "gguf", "<!DOCTYPE html><html>404</html>")


def _in_place_of_weights(place: Place, kind: str, content: str) -> list[Any]:
    if kind == "onnx":
        return quantize(place.write("model.onnx", content), place)
    if kind == "gguf":
        return _export(place.write("model.gguf", content), place)
    source = place.own(place.checkpoint())
    (source / "model.safetensors").write_text(content)
    return _export(source, place)


@fault("A6", 3, "truncated or corrupt ONNX", each={f"{part}": part for part in range(1, 16)})
def cut_onnx(place: Place, part: int) -> list[Any]:
    whole = graphs.model().SerializeToString()
    return quantize(place.write("model.onnx", whole[: len(whole) * part // 16]), place)


@fault("A7", 3, "external data missing", "weights.data", "`weight`")
def data_missing(place: Place) -> list[Any]:
    model = graphs.save_external(place.folder / "model")
    (model.parent / "weights.data").unlink()
    return quantize(model, place)


@fault("A9", 3, "weights.data", "changed while it was read")
def data_replaced_while_running(place: Place) -> list[Any]:
    model = graphs.save_external(place.folder / "model")
    path, save = model.parent / "weights.data", WeightFile.save
    state = path.stat()

    def replace(*arguments: Any) -> Any:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        return save(*arguments)

    place.patch.setattr(WeightFile, "save", replace)
    place.changes = True
    return quantize(model, place)


_BYTES = 4 * graphs.SIZE**2


@fault(
    "A8",
    3,
    f"needs {_BYTES} bytes",
    "the file has",
    each={"by-a-byte": _BYTES - 1, "half": _BYTES // 2, "to-nothing": 0},
)
def data_cut(place: Place, size: int) -> list[Any]:
    return quantize(graphs.save_external(place.folder / "model", b"\0" * size), place)


@fault("A8", 3, "needs 16384 bytes", alone=True)
def data_cut_for_inference(place: Place) -> list[Any]:
    model = graphs.save_external(place.folder / "model", b"\0" * 4095)
    tiny_decoder.save_tokenizer(model.parent)
    return ["infer", model, "-p", "x", "--raw"]


@fault(
    "A10",
    3,
    "`weight`",
    each={
        "offset-negative": {"offset": -1},
        "offset-word": {"offset": "much"},
        "offset-huge": {"offset": 2**63},
        "length-negative": {"length": -1},
        "length-huge": {"length": 2**63},
        "past-the-end": {"offset": 4096},
        "no-location": {"location": None},
    },
)
def external_place(place: Place, entries: dict[str, object]) -> list[Any]:
    return quantize(graphs.save_external(place.folder / "model", **entries), place)


@fault("A11", 3, "`weight`", "unknown key `__class__`")
def external_key(place: Place) -> list[Any]:
    return quantize(graphs.save_external(place.folder / "model", __class__="os"), place)


def _with_dims(*dims: int) -> Any:
    proto = graphs.model()
    proto.graph.initializer[0].ClearField("dims")
    proto.graph.initializer[0].dims.extend(dims)
    return proto


@fault(
    "A12",
    3,
    "`weight`",
    each={
        "negative": (4, -1),
        "overflow": (2**31, 2**31, 4),
        "rank-100": (1,) * 100,
        "other-size": (graphs.SIZE, graphs.SIZE + 1),
    },
)
def tensor_shape(place: Place, dims: tuple[int, ...]) -> list[Any]:
    return quantize(graphs.save(place.folder, _with_dims(*dims)), place)


@fault("A12", 3, "`weight`", "unknown type 999")
def tensor_type(place: Place) -> list[Any]:
    proto = graphs.model()
    proto.graph.initializer[0].data_type = 999
    return quantize(graphs.save(place.folder, proto), place)


@fault("A13", 3, "initializer `weight`", "there twice")
def initializer_twice(place: Place) -> list[Any]:
    return quantize(graphs.save(place.folder, graphs.model(constants=[graphs.weight()])), place)


@fault(
    "A13",
    3,
    "the_Relu",
    each={"cyclic": ("z", "z"), "dangling": ("nobody", "z"), "made-twice": ("x", "y")},
)
def wiring(place: Place, names: tuple[str, str]) -> list[Any]:
    read, made = names
    return quantize(graphs.save(place.folder, graphs.model([graphs.node("Relu", [read], [made])])), place)


@fault(
    "A13",
    3,
    "the_",
    each={
        "no-output": graphs.node("Relu", ["x"], []),
        "no-input": graphs.node("MatMul", ["x"], ["z"]),
        "no-attribute": graphs.node("Cast", ["x"], ["z"]),
        "contrib": helper.make_node("MatMulNBits", ["x"], ["z"], name="the_one", domain="com.microsoft"),
    },
)
def incomplete_node(place: Place, node: NodeProto) -> list[Any]:
    return quantize(graphs.save(place.folder, graphs.model([node])), place)


@fault("A13", 3, "not UTF-8")
def name_that_is_no_text(place: Place) -> list[Any]:
    content = graphs.model([graphs.node("Relu", ["x"], ["zzzz"])]).SerializeToString()
    return quantize(place.write("model.onnx", content.replace(b"zzzz", b"z\xff\xfez")), place)


@fault("A14", 3, "nesting too deep", each={"20": 20, "40": 40, "4000": 4000})
def subgraphs(place: Place, depth: int) -> list[Any]:
    return quantize(place.write("model.onnx", graphs.nested(depth)), place)


@fault("A14", 3, "nesting too deep", alone=True)
def chain_of_functions(place: Place) -> list[Any]:
    chain = [graphs.function(f"f{index}", f"f{index + 1}") for index in range(3000)]
    chain.append(graphs.function("f3000", "Relu"))
    call = helper.make_node("f0", ["x"], ["z"], domain="local")
    return quantize(graphs.save(place.folder, graphs.model([call], functions=chain)), place)


@fault("A14", 3, "recursive function", "f0", alone=True)
def recursive_function(place: Place) -> list[Any]:
    call = helper.make_node("f0", ["x"], ["z"], domain="local")
    return quantize(graphs.save(place.folder, graphs.model([call], functions=[graphs.function("f0", "f0")])), place)


@fault("A15", 3, "the_Conv", "`strides`")
def zero_stride(place: Place) -> list[Any]:
    return quantize(
        graphs.save(place.folder, graphs.model([graphs.node("Conv", ["x", "x"], ["z"], strides=[0, 1])])), place
    )


@fault("A15", 3, "the_DepthToSpace", "`blocksize`")
def block_size(place: Place) -> list[Any]:
    nodes = [graphs.node("DepthToSpace", ["x"], ["z"], blocksize=2**32)]
    return quantize(graphs.save(place.folder, graphs.model(nodes)), place)


@fault("A15", 3, "2 outputs", "its function has")
def outputs_of_a_function(place: Place) -> list[Any]:
    call = helper.make_node("f0", ["x"], ["z", "z2"], domain="local")
    functions = [graphs.function("f0", "Relu")]
    return quantize(graphs.save(place.folder, graphs.model([call], functions=functions)), place)


_RANGE = [numpy_helper.from_array(np.array(value), name) for name, value in zip("abc", (0, 2**32, 1), strict=True)]


@fault(
    "A16",
    6,
    "would need",
    "GiB",
    each={
        "ConstantOfShape": [_shape("shape", 2**27)],
        "Range": _RANGE,
        "Expand": [_shape("one", 1), _shape("shape", 2**14, 2**14)],
        "Tile": [_shape("one", 1), _shape("shape", 2**28)],
    },
)
def constants_without_end(place: Place, constants: list[TensorProto]) -> list[Any]:
    names = [tensor.name for tensor in constants]
    kind = {1: "ConstantOfShape", 3: "Range"}.get(len(names)) or ("Tile" if constants[1].dims[0] == 1 else "Expand")
    return quantize(graphs.save(place.folder, graphs.model([graphs.node(kind, names, ["z"])], constants)), place)


@fault("A17", 5, "ir_version 99", "at most")
def ir_version(place: Place) -> list[Any]:
    return quantize(graphs.save(place.folder, graphs.model(ir_version=99)), place)


@fault("A17", 5, "opset", each={"newer": 99, "older": 12})
def opset(place: Place, version: int) -> list[Any]:
    return quantize(graphs.save(place.folder, graphs.model(opset=version)), place)


@fault("A17", 5, "opset 0")
def opset_missing(place: Place) -> list[Any]:
    proto = graphs.model()
    proto.ClearField("opset_import")
    return quantize(graphs.save(place.folder, proto), place)


@fault("A18", 3, "over the 2 GiB protobuf limit")
def large_protobuf(place: Place) -> list[Any]:
    path = graphs.save(place.folder)
    os.truncate(path, 2**31)  # sparse
    return quantize(path, place)


def _safetensors(header: dict[str, Any] | bytes, data: int = 0, length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + b"\0" * data


def _tensor(first: int, last: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last]}


@fault(
    "A19",
    3,
    "safetensors",
    each={
        "length-2^63": _safetensors(b"{}", length=2**63),
        "length-200MB": _safetensors(b"{}", length=200_000_000),
        "no-object": _safetensors(b"[1, 2]"),
        "nothing": b"",
        "short": b"\1\2",
        "hole": _safetensors({"a": _tensor(0, 4), "b": _tensor(8, 12)}, 12),
        "overlap": _safetensors({"a": _tensor(0, 8), "b": _tensor(4, 12)}, 12),
        "twice": _safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', 4),
        "past-the-end": _safetensors({"a": _tensor(0, 400)}, 4),
        "backwards": _safetensors({"a": _tensor(0, 4) | {"data_offsets": [4, 0]}}, 4),
        "type": _safetensors({"a": _tensor(0, 4) | {"dtype": "F33"}}, 4),
        "shape": _safetensors({"a": _tensor(0, 4) | {"shape": [-1]}}, 4),
        "shape-overflow": _safetensors({"a": _tensor(0, 4) | {"shape": [2**62, 8]}}, 4),
    },
)
def safetensors(place: Place, content: bytes) -> list[Any]:
    source = place.own(place.checkpoint())
    (source / "model.safetensors").write_bytes(content)
    return _export(source, place, "--dry-run")


@fault("A19", 3, "is missing from")
def a_hundred_thousand_tensors(place: Place) -> list[Any]:
    header = {f"t{index}": _tensor(4 * index, 4 * index + 4) for index in range(100_000)}
    source = place.own(place.checkpoint())
    (source / "model.safetensors").write_bytes(_safetensors(header, 400_000))
    return _export(source, place, "--dry-run")  # read whole, and found to be another model's


def _gguf(code: int) -> dict[str, bytes]:
    return {name: content for name, (content, error, _) in DAMAGED.items() if error.exit_code == code}


@fault("A20", 3, "model.gguf", each=_gguf(3))
def gguf(place: Place, content: bytes) -> list[Any]:
    return _export(place.write("model.gguf", content), place)


@fault("A20", 5, "model.gguf", each=_gguf(5))
def gguf_of_another_kind(place: Place, content: bytes) -> list[Any]:
    return _export(place.write("model.gguf", content), place)


@fault("A20", 3, "43.gguf", alone=True)
def gguf_of_43_bytes(place: Place) -> list[Any]:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 0) + struct.pack("<IIQ", 9, 0, 2**63 - 1)
    return _export(place.write("43.gguf", header[:43]), place)


@fault("A21", 3, "model-00002.safetensors", each={"missing": True})
def shards(place: Place, _: bool) -> list[Any]:
    source = place.own(place.checkpoint())
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return _export(source, place)


@fault("A21", 3, "is in `", "and in `")
def tensor_in_two_shards(place: Place) -> list[Any]:
    source = place.own(place.checkpoint())
    content = (source / "model.safetensors").read_bytes()
    (source / "second.safetensors").write_bytes(content)
    index = {"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return _export(source, place)


@fault("A21", 3, "model.safetensors", "declares", each={"more": 1, "fewer": -1})
def total_size(place: Place, change: int) -> list[Any]:
    source = place.own(place.checkpoint())
    file = SafetensorsFile(source / "model.safetensors")
    names = dict.fromkeys(file.entries, "model.safetensors")
    index = {"metadata": {"total_size": file.tensor_bytes + change}, "weight_map": names}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return _export(source, place)


def _zip(place: Place, compression: int) -> Any:
    source = place.own(place.checkpoint())
    (source / "model.safetensors").unlink()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00." + b"\0" * 10_000_000)
    return source


@fault("A22", 3, "data.pkl", "is compressed")
def zip_bomb(place: Place) -> list[Any]:
    return _export(_zip(place, zipfile.ZIP_DEFLATED), place, "--allow-pickle")


@fault("A22", 3, "archive/other", "overlaps")
def overlapping_entries(place: Place) -> list[Any]:
    source = _zip(place, zipfile.ZIP_STORED)
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/other", b"1")
        archive.filelist[1].header_offset = archive.filelist[0].header_offset + 1
    return _export(source, place, "--allow-pickle")


@fault("A22", 4, "bare pickle")
def legacy_pickle(place: Place) -> list[Any]:
    source = place.own(place.checkpoint())
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR.")
    return _export(source, place, "--allow-pickle")


@fault(
    "A23",
    3,
    "config.json",
    each={
        "not-utf-8": b'{"a":\n"\xff"}',
        "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "twice": b'{"model_type": "llama", "model_type": "bert"}',
        "long-integer": b'{"a": ' + b"9" * 1_000_000 + b"}",
        "nan": b'{"a": NaN}',
        "cut": b'{"a": [1,\n2',
        "array": b"[]",
    },
)
def config(place: Place, content: bytes) -> list[Any]:
    source = place.own(place.checkpoint())
    (source / "config.json").write_bytes(content)
    return _export(source, place)


@fault("A23", 3, "config.json", "line 2")
def line_of_a_config(place: Place) -> list[Any]:
    source = place.own(place.checkpoint())
    (source / "config.json").write_bytes(b'{"a": 1,\n"b" 2}')
    return _export(source, place)


@fault(
    "A23",
    3,
    "llmfast.json",
    each={"not-utf-8": b'{"\xff"', "nan": b'{"format": NaN}', "array": b"[]", "empty": b"", "deep": b"[" * 100_000},
)
def manifest(place: Place, content: bytes) -> list[Any]:
    model = place.own(place.decoder)
    (model / "llmfast.json").write_bytes(content)
    return ["infer", model, "-p", "x"]
