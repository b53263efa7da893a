"""What reads files of strangers, one function each, for `scripts/fuzz.sh` and its short replay in `test_fuzz.py`.

A target gets bytes and an empty folder. It may refuse them with an `LlmfastError`; anything else is a finding.
"""

import contextlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save

from llmfast.bundle import MANIFEST, ModelBundle, parse_json
from llmfast.chat_template import render_template
from llmfast.errors import LlmfastError
from llmfast.export.gguf_file import GgufFile
from llmfast.export.pickle_checkpoint import check_archive
from llmfast.export.safetensors_file import SafetensorsFile
from llmfast.graph.model import OnnxModel, check_file
from llmfast.inspect.stage import inspect
from llmfast.tokenizer import Tokenizer
from tests import tiny_decoder
from tests.faults import graphs
from tests.test_gguf_file import DAMAGED


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        run: reads the content; whatever it raises but `LlmfastError` is a finding.
        seeds: sound and nearly sound files, made in an empty folder.
    """

    run: Callable[[bytes, Path], None]
    seeds: Callable[[Path], list[bytes]]

    def survives(self, content: bytes, folder: Path) -> None:
        failure = None
        try:
            self.run(content, folder)
        except LlmfastError as error:
            failure = error
        if failure is not None:
            assert failure.exit_code != 1
            assert len(failure.message) < 2000


def _read_onnx(content: bytes, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(content)
    (folder / "weights.data").write_bytes(b"\0" * 4 * graphs.SIZE**2)
    with contextlib.suppress(LlmfastError):
        check_file(path)
    model = OnnxModel.load(path)
    for tensor in model.proto.graph.initializer:
        model.read(tensor)
    inspect(path)


def _onnx_seeds(folder: Path) -> list[bytes]:
    tiny_decoder.write_decoder(folder / "decoder.onnx", tiny_decoder.make_weights())
    call = graphs.model(functions=[graphs.function("f0", "Relu")])
    external = graphs.save_external(folder / "external")
    files = [graphs.model().SerializeToString(), call.SerializeToString(), external.read_bytes(), graphs.nested(3)]
    return [*files, (folder / "decoder.onnx").read_bytes()]


def _read_safetensors(content: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    file = SafetensorsFile(path)
    for name in file.entries:
        file.read_stored(name).sum()


def _safetensors_seeds(folder: Path) -> list[bytes]:
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8), "c": np.ones((1, 2), np.float16)}
    return [save(arrays), save({"a": np.ones(0, np.float32)}, {"format": "pt"}), struct.pack("<Q", 2) + b"{}"]


def _read_gguf(content: bytes, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(content)
    file = GgufFile(path)
    for name in file.tensors:
        file.read(name)


def _gguf_seeds(folder: Path) -> list[bytes]:
    writer = gguf.GGUFWriter(folder / "sound.gguf", "llama")
    writer.add_uint32("a.number", 7)
    writer.add_array("a.texts", ["one", "two"])
    writer.add_array("a.numbers", [1.5, 2.5])
    writer.add_tensor("t", np.ones((2, 32), np.float32))
    quantized = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("q", gguf.quants.quantize(np.ones((2, 32), np.float32), quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [(folder / "sound.gguf").read_bytes(), *(content for content, _, _ in DAMAGED.values())]


def _read_json(content: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content)
    (folder / "model.onnx").write_bytes(b"graph")
    try:
        document = parse_json(content)
    except ValueError:
        document = None
    bundle = ModelBundle.open(folder)
    assert document is not None
    assert bundle.longest_text() > 0
    assert bundle.size_bytes >= 0
    assert bundle.graphs
    assert bundle.name


def _json_seeds(folder: Path) -> list[bytes]:
    bundle = folder / "bundle"
    bundle.mkdir()
    manifest = (tiny_decoder.write_bundle(bundle) / MANIFEST).read_bytes()
    document = json.loads(manifest)
    document["files"] = {"model.onnx": {"sha256": "0", "bytes": 5}}
    return [manifest, json.dumps(document).encode(), b"{}", b'{"format": 1}', b"[[[[[[1e999]]]]]]"]


def _read_tokenizer(content: bytes, folder: Path) -> None:
    settings, _, tokenizer = content.partition(b"\0")
    (folder / "tokenizer_config.json").write_bytes(settings)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    loaded = Tokenizer.load(folder)
    loaded.check_fits(1 << 20)
    ids = loaded.encode("Ab cd é 12")
    loaded.decode(ids)
    if loaded.chat_template is not None and len(loaded.chat_template) < 200:
        loaded.apply_chat_template([{"role": "user", "content": "x"}])


_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
_SPLIT = {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False}
_TOKENIZERS = (
    {
        "added_tokens": [{"id": 1, "content": "<s>", "special": True} | _FLAGS],
        "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1}, "merges": []},
    },
    {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}, "pre_tokenizer": _SPLIT},
    {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.0]], "byte_fallback": False}},
    {"model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}},
)


def _tokenizer_seeds(folder: Path) -> list[bytes]:
    tiny_decoder.save_tokenizer(folder)
    settings = json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).encode()
    documents = [json.dumps({"version": "1.0"} | one).encode() for one in _TOKENIZERS]
    return [settings + b"\0" + document for document in (*documents, (folder / "tokenizer.json").read_bytes())]


def _read_template(content: bytes, folder: Path) -> None:
    render_template(content.decode("utf-8", "replace"), {"messages": [{"role": "user", "content": "x"}]})


def _template_seeds(folder: Path) -> list[bytes]:
    return [
        b"{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}{% endfor %}",
        b"{% set n = namespace(a=1) %}{% if n.a is defined %}{{ messages | tojson }}{% endif %}",
        b"{{ messages[0]['content'].split('x')[-1] ~ strftime_now('%d') }}",
    ]


def _read_archive(content: bytes, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(content)
    check_archive(folder / "pytorch_model.bin")


def _archive_seeds(folder: Path) -> list[bytes]:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", b"\0" * 16)
    return [made.getvalue(), b"\x80\x02}.", b""]


TARGETS = {
    "onnx": Target(_read_onnx, _onnx_seeds),
    "safetensors": Target(_read_safetensors, _safetensors_seeds),
    "gguf": Target(_read_gguf, _gguf_seeds),
    "json": Target(_read_json, _json_seeds),
    "tokenizer": Target(_read_tokenizer, _tokenizer_seeds),
    "archive": Target(_read_archive, _archive_seeds),
    "template": Target(_read_template, _template_seeds),
}
