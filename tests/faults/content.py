"""Rows B: hostile content."""

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx import helper

from tests import tiny_decoder
from tests.faults import graphs
from tests.faults.table import Place, fault, quantize

_NAMES = {
    "absolute": "/etc/hostname",
    "above": "../canary",
    "above-and-back": "a/../../canary",
    "backslash": "..\\canary",
    "drive": "C:canary",
    "nul": "weights.data\0x",
    "empty": "",
    "itself": ".",
    "double": "a//b",
}


@fault("B1", 4, "`weight`", "outside its folder", each=_NAMES)
def location(place: Place, name: str) -> list[Any]:
    return quantize(graphs.save_external(place.folder / "model", location=name), place)


def _link(place: Place, target: str | Path) -> Path:
    model = graphs.save_external(place.folder / "model")
    (model.parent / "weights.data").unlink()
    (model.parent / "weights.data").symlink_to(target)
    return model


@fault(
    "B2",
    4,
    "weights.data",
    "a link to",
    each={"dangling": "nowhere", "loop": "weights.data", "absolute": "/etc/hostname"},
)
def link(place: Place, target: str) -> list[Any]:
    return quantize(_link(place, target), place)


@fault("B2", 4, "weights.data", "canary")
def link_to_a_file_outside(place: Place) -> list[Any]:
    return quantize(_link(place, place.canary), place)


@fault("B2", 4, "weights.data", alone=True)
def link_for_inference(place: Place) -> list[Any]:
    model = _link(place, place.canary)
    tiny_decoder.save_tokenizer(model.parent)
    return ["infer", model, "-p", "x"]


def _hub_cache(place: Place, source: Path) -> Path:
    """Lay a folder out as huggingface_hub does: the snapshot holds links to blobs."""
    root = place.folder / "hub" / "models--a--b"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        (root / "blobs" / f"blob-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    return snapshot


_COMMANDS: dict[str, Callable[[Path, Place], list[Any]]] = {
    "quantize": quantize,
    "export": lambda model, place: ["export", model, "-o", place.output],
}


@fault("B3", 0, each={"external": graphs.save_external}, writes=True)
def hub_cache_quantize(place: Place, save: Callable[[Path], Path]) -> list[Any]:
    return quantize(_hub_cache(place, save(place.folder / "plain").parent) / "model.onnx", place)


@fault("B3", 0, writes=True)
def hub_cache_export(place: Place) -> list[Any]:
    return ["export", _hub_cache(place, place.checkpoint()), "-o", place.output]


@fault(
    "B3",
    0,
    alone=True,
    each={
        "infer": ["infer", "-p", "x", "--max-tokens", 2],
        "inspect": ["inspect"],
        "bench": ["bench", "-p", 4, "-n", 2, "--rounds", 1, "--warmup", 0],
        "verify": ["verify"],
    },
)
def hub_cache(place: Place, arguments: list[Any]) -> list[Any]:
    return [arguments[0], _hub_cache(place, place.decoder), *arguments[1:]]


@fault("B3", 4, "a link to", "models--other")
def hub_cache_of_another_model(place: Place) -> list[Any]:
    snapshot = _hub_cache(place, graphs.save_external(place.folder / "plain").parent)
    other = place.write("hub/models--other/blobs/x", b"\0" * 4 * graphs.SIZE**2)
    (snapshot / "weights.data").unlink()
    (snapshot / "weights.data").symlink_to(other)
    return quantize(snapshot / "model.onnx", place)


@fault("B4", 4, "weights.data", "hard links", "--allow-hardlinks")
def hard_link(place: Place) -> list[Any]:
    model = graphs.save_external(place.folder / "model")
    os.link(model.parent / "weights.data", place.folder / "other")
    return quantize(model, place)


@fault("B4", 0, writes=True)
def hard_link_allowed(place: Place) -> list[Any]:
    model = graphs.save_external(place.folder / "model")
    os.link(model.parent / "weights.data", place.folder / "other")
    return ["--allow-hardlinks", *quantize(model, place)]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may be 108 bytes long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


@fault(
    "B6",
    4,
    "weights.data",
    each={
        "fifo": _fifo,
        "socket": _socket,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "environment": lambda path: path.symlink_to("/proc/self/environ"),
    },
)
def no_file(place: Place, make: Callable[[Path], None]) -> list[Any]:
    model = graphs.save_external(place.folder / "model")
    (model.parent / "weights.data").unlink()
    make(model.parent / "weights.data")
    return quantize(model, place)


@fault("B7", 4, "canary", "leaves the folder")
def shard_outside(place: Place) -> list[Any]:
    source = place.own(place.checkpoint())
    index = {"weight_map": {"a": "../../canary"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["export", source, "-o", place.output]


@fault("B7", 4, "chat template", "../../canary")
def template_outside(place: Place) -> list[Any]:
    source = place.own(place.checkpoint())
    (source / "tokenizer.json").unlink()
    (source / "vocab.txt").write_text("a")
    settings = {"chat_template": [{"name": "../../canary", "template": "x"}]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return ["export", source, "-o", place.output]


class _Hostile:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


def _with_pickle(place: Place) -> Path:
    import torch

    source = place.own(place.checkpoint())
    (source / "model.safetensors").unlink()
    torch.save({"a": _Hostile(place.folder / "sentinel")}, source / "pytorch_model.bin")
    return source


@fault("B8", 4, "is a pickle", "--allow-pickle")
def pickle_without_leave(place: Place) -> list[Any]:
    return ["export", _with_pickle(place), "-o", place.output]


@fault("B9", 4, "posix.system")
def pickle_that_runs_code(place: Place) -> list[Any]:
    return ["export", _with_pickle(place), "-o", place.output, "--allow-pickle"]


@fault("B8", 4, "is a pickle")
def pickle_named_safetensors(place: Place) -> list[Any]:
    weights = place.write("weights.pt", pickle.dumps(_Hostile(place.folder / "sentinel")))
    module = place.write("net.py", "import torch\ndef make():\n    return torch.nn.Linear(2, 2), (torch.ones(1, 2),)\n")
    return ["export", "--module", f"{module}:make", "--weights", weights, "-o", place.output]


_EVIL = "raise SystemExit(99)\n"


@fault("B10", 0, "ignoring", "auto_map", "trust_remote_code", writes=True)
def code_in_a_config(place: Place) -> list[Any]:
    source = place.own(place.checkpoint())
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["_attn_implementation_internal"] = "evil/repository:attention"
    config["nested"] = {"trust_remote_code": True}
    (source / "config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text(_EVIL)
    return ["export", source, "-o", place.output]


@fault("B10", 5, "not supported", each={"unknown": "evil"})
def code_without_a_built_in_class(place: Place, model_type: str) -> list[Any]:
    source = place.own(place.checkpoint())
    (source / "config.json").write_text(
        json.dumps({"model_type": model_type, "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (source / "evil.py").write_text(_EVIL)
    return ["export", source, "-o", place.output]


@fault(
    "B11",
    0,
    alone=True,
    inside="model",
    each={
        "infer": ["infer", ".", "-p", "x", "--max-tokens", 2],
        "bench": ["bench", ".", "-p", 4, "-n", 2, "--rounds", 1, "--warmup", 0],
    },
)
def modules_in_the_folder(place: Place, arguments: list[Any]) -> list[Any]:
    model = place.own(place.decoder)
    for name in ("torch", "json", "numpy", "onnx", "onnxruntime", "sitecustomize"):
        (model / f"{name}.py").write_text(_EVIL)
    return arguments


@fault("B12", 4, "genai_config.json", each={"library": "custom_ops_library", "file": "optimized_model_filepath"})
def native_code_in_genai_config(place: Place, key: str) -> list[Any]:
    folder = place.folder / "model"
    folder.mkdir()
    tiny_decoder.write_decoder(folder / "model.onnx", tiny_decoder.make_weights())
    tiny_decoder.save_tokenizer(folder)
    genai = {"model": {"context_length": 64, "decoder": {"session_options": {key: "evil.so"}}}}
    (folder / "genai_config.json").write_text(json.dumps(genai))
    return ["infer", folder, "-p", "x"]


@fault("B13", 5, "Exotic", "`com.example`", each={"quantize": "quantize", "infer": "infer"})
def unknown_domain(place: Place, command: str) -> list[Any]:
    proto = graphs.model([helper.make_node("Exotic", ["x"], ["z"], domain="com.example")])
    proto.opset_import.add(domain="com.example", version=1)
    model = graphs.save(place.folder / "model", proto)
    tiny_decoder.save_tokenizer(model.parent)
    return quantize(model, place) if command == "quantize" else ["infer", model, "-p", "x"]


def _with_template(place: Place, template: str) -> list[Any]:
    model = tiny_decoder.write_bundle(_made(place.folder / "model"), {"chat_template.jinja": template})
    return ["infer", model, "-p", "x", "--max-tokens", 1]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@fault("B14", 4, "unsafe", each={"class": "{{ ''.__class__.__mro__ }}", "code": "{{ cycler.__init__.__globals__.os }}"})
def template_that_escapes(place: Place, template: str) -> list[Any]:
    return _with_template(place, template)


@fault(
    "B14",
    6,
    "chat template takes more than",
    each={
        "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "string": "{{ 'x' * 10 ** 9 }}",
        "format": "{{ '%1000000000d' % 1 }}",
        "doubling": "{% set n = namespace(s='x' * 999) %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "output": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    },
)
def template_without_end(place: Place, template: str) -> list[Any]:
    return _with_template(place, template)


@fault(
    "B14",
    3,
    "chat template",
    each={"syntax": "{% if %}", "refusal": "{{ raise_exception('no') }}", "name": "{{ a.b.c }}"},
)
def template_that_fails(place: Place, template: str) -> list[Any]:
    return _with_template(place, template)


@fault("B15", 6, "regular expression that may take forever", each={"plus": "(a+)+$", "class": "([a-z]+\\s?)*x"})
def regular_expression(place: Place, pattern: str) -> list[Any]:
    model = _made(place.folder / "model")
    tiny_decoder.write_decoder(model / "model.onnx", tiny_decoder.make_weights())
    tiny_decoder.save_tokenizer(model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return ["infer", model, "-p", "a" * 64 + "!"]


@fault("B15", 6, "10,000,000 characters", each={"text-generation": False, "raw": True})
def endless_prompt(place: Place, raw: bool) -> list[Any]:
    return ["infer", place.decoder, "--input", place.write("prompt.txt", "x" * 10_000_000), *(["--raw"] if raw else [])]


_ESCAPES = "w\x1b]0;owned\x07\x1b[31m\n\u202ename"


@fault("B16", 0, each={"table": "table", "csv": "csv", "md": "md", "json": "json"})
def escapes_in_names(place: Place, output_format: str) -> list[Any]:
    proto = graphs.model([graphs.node("Relu", ["y"], [_ESCAPES])])
    proto.graph.output[0].name = _ESCAPES
    proto.graph.node[1].name = _ESCAPES
    return ["inspect", graphs.save(place.folder, proto), "--format", output_format]


@fault("B16", 3, "\\x1b")
def escapes_in_an_error(place: Place) -> list[Any]:
    proto = graphs.model()
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = _ESCAPES
    proto.graph.initializer[0].dims[0] = -1
    return quantize(graphs.save(place.folder, proto), place)


def _changed(place: Place) -> Path:
    model = place.own(place.decoder)
    content = bytearray((model / "model.onnx").read_bytes())
    content[-40] ^= 1
    (model / "model.onnx").write_bytes(content)
    return model


@fault("B17", 3, "`model.onnx` is changed", each={"infer": ["infer", "-p", "x"], "bench": ["bench", "-p", 4, "-n", 2]})
def weights_changed(place: Place, arguments: list[Any]) -> list[Any]:
    return [arguments[0], _changed(place), *arguments[1:], "--verify"]


@fault("B17", 4, "is not signed", "model.sig")
def unsigned(place: Place) -> list[Any]:
    return ["verify", place.decoder, "--require-signature", place.write("key.pem", "")]
