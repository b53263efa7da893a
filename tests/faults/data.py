"""Rows C: models and data that are sound files, and yet can't be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from llmfast.bundle import Manifest, write_manifest
from llmfast.graph.packed import QuantizedWeight
from tests import tiny_decoder
from tests.faults import graphs
from tests.faults.table import Place, fault, quantize


def _with_weight(place: Place, change: Callable[[np.ndarray], None]) -> Path:
    proto = graphs.model()
    values = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    change(values)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "weight"))
    return graphs.save(place.folder, proto)


def _nan(values: np.ndarray) -> None:
    values[3, 5] = np.nan


def _infinity(values: np.ndarray) -> None:
    values[3, 5] = -np.inf


@fault("C1", 3, "weight", "NaN", each={"nan": _nan, "infinity": _infinity})
def not_finite(place: Place, change: Callable[[np.ndarray], None]) -> list[Any]:
    return quantize(_with_weight(place, change), place)


@fault("C1", 3, "q_proj.weight", "NaN")
def not_finite_checkpoint(place: Place) -> list[Any]:
    from safetensors.numpy import load_file, save_file

    source = place.own(place.checkpoint())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][1, 2] = np.nan
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    return ["export", source, "-o", place.output]


def _quantize_with_gptq(place: Place) -> list[Any]:
    text = place.write("text.txt", b"some words to calibrate on " * 40)
    return quantize(place.decoder, place, "--method", "gptq", "--calibration", text, "--seq-len", 32)


@fault("C2", 0, "singular statistics: rounded to nearest", writes=True)
def no_cholesky_factor(place: Place) -> list[Any]:
    def fail(matrix: np.ndarray) -> np.ndarray:
        raise np.linalg.LinAlgError("not positive definite")

    place.patch.setattr(np.linalg, "cholesky", fail)
    return _quantize_with_gptq(place)


@fault("C2", 7, "NaN or infinite", "--method")
def nan_after_quantization(place: Place) -> list[Any]:
    place.patch.setattr(QuantizedWeight, "dequantize", lambda weight: np.full((1, 1), np.nan, np.float32))
    return _quantize_with_gptq(place)


def _constant(values: np.ndarray) -> None:
    values[:] = 0.25


def _zero(values: np.ndarray) -> None:
    values[:] = 0


def _denormal(values: np.ndarray) -> None:
    values[:] = 1e-42


def _large(values: np.ndarray) -> None:
    values[::2], values[1::2] = 65504, -65504


_ROWS = {"constant": _constant, "zero": _zero, "denormal": _denormal, "large": _large}


@fault(
    "C3",
    0,
    each={f"{name}-{scheme}": (change, scheme) for name, change in _ROWS.items() for scheme in ("int8", "int4", "w8")},
    writes=True,
)
def rows(place: Place, case: tuple[Callable[[np.ndarray], None], str]) -> list[Any]:
    change, scheme = case
    return ["quantize", _with_weight(place, change), "-o", place.output, "--scheme", scheme, "--no-measure"]


@fault("C4", 2, "block_size", each={"0": 0, "negative": -1, "odd": 33, "word": "x"})
def block_size(place: Place, size: object) -> list[Any]:
    model = graphs.save(place.folder)
    return ["quantize", model, "-o", place.output, "--scheme", "int4", "--set", f"block_size={size}"]


@fault("C5", 5, "already")
def already_quantized(place: Place) -> list[Any]:
    from llmfast.quantize.stage import QuantizeOptions
    from llmfast.quantize.stage import quantize as run

    run(graphs.save(place.folder), place.folder / "int8", QuantizeOptions("int8", measure=False))
    return quantize(place.folder / "int8", place)


@fault("C6", 5, "nothing to quantize", each={"no-layer": None, "no-match": ["--include", "nothing"]})
def nothing_to_do(place: Place, more: list[str] | None) -> list[Any]:
    proto = graphs.model()
    if more is None:
        proto.graph.node[0].CopyFrom(graphs.node("Add", ["x", "weight"], ["y"]))
    return quantize(graphs.save(place.folder, proto), place, *(more or []))


@fault("C6", 2, "not a regular expression")
def pattern(place: Place) -> list[Any]:
    return quantize(graphs.save(place.folder), place, "--include", "(")


def _without_tokenizer(place: Place) -> Path:
    model = place.folder / "model"
    model.mkdir()
    tiny_decoder.write_decoder(model / "model.onnx", tiny_decoder.make_weights())
    architecture = {"context_length": tiny_decoder.CONTEXT, "vocab_size": tiny_decoder.VOCAB}
    graph = {"model": {"file": "model.onnx", "inputs": [], "outputs": []}}
    write_manifest(model, Manifest("text-generation", architecture=architecture, graphs=graph))
    return model


@fault("C7", 3, "no tokenizer")
def tokenizer_missing(place: Place) -> list[Any]:
    return ["infer", _without_tokenizer(place), "-p", "x"]


@fault("C7", 0, writes=True)
def tokenizer_not_needed(place: Place) -> list[Any]:
    return quantize(_without_tokenizer(place), place)


def _with_tokens(place: Place, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write the tiny decoder with another tokenizer."""
    model = _without_tokenizer(place)
    tiny_decoder.save_tokenizer(model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    change(tokenizer)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    manifest = json.loads((model / "llmfast.json").read_text())
    write_manifest(model, Manifest("text-generation", architecture=manifest["architecture"], graphs=manifest["graphs"]))
    return model


@fault("C8", 3, "token 5000", f"{tiny_decoder.VOCAB} rows")
def token_beyond_the_embedding(place: Place) -> list[Any]:
    return ["infer", _with_tokens(place, lambda tokenizer: tokenizer["model"]["vocab"].update(zz=5000)), "-p", "x"]


def _add_tokens(tokenizer: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index in range(tiny_decoder.TOKENS, tiny_decoder.VOCAB + 1):
        tokenizer["added_tokens"].append({"id": index, "content": f"<{index}>", "special": True} | flags)


@fault("C8", 3, f"token {tiny_decoder.VOCAB} is not in the model")
def added_token_beyond_the_embedding_in_a_prompt(place: Place) -> list[Any]:
    return ["infer", _with_tokens(place, _add_tokens), "-p", f"x <{tiny_decoder.VOCAB}>"]


@fault("C8", 0)
def added_token_beyond_the_embedding_elsewhere(place: Place) -> list[Any]:
    return ["infer", _with_tokens(place, _add_tokens), "-p", "x", "--max-tokens", 4]


@fault("C9", 0)
def more_rows_than_tokens(place: Place) -> list[Any]:
    return ["infer", place.decoder, "-p", "x", "--max-tokens", 8, "--temperature", 2, "--seed", 1]


_TEXTS = {"empty": b"", "blank": b" \n\t\n", "encoding": b"caf\xe9 " * 100}


@fault("C10", 3, "text.txt", each=_TEXTS)
def calibration(place: Place, content: bytes) -> list[Any]:
    text = place.write("text.txt", content)
    return quantize(place.decoder, place, "--method", "gptq", "--calibration", text, "--seq-len", 16)


@fault("C10", 3, "text too short")
def calibration_short(place: Place) -> list[Any]:
    text = place.write("text.txt", b"a few words")
    return quantize(place.decoder, place, "--method", "gptq", "--calibration", text, "--seq-len", 64)


@fault("C10", 0, "were asked for", writes=True)
def calibration_of_one_window(place: Place) -> list[Any]:
    text = place.write("text.txt", b"a few words " * 12)
    return quantize(
        place.decoder, place, "--method", "gptq", "--calibration", text, "--seq-len", 64, "--num-samples", 9
    )


@fault("C10", 0, writes=True)
def calibration_of_one_huge_line(place: Place) -> list[Any]:
    text = place.write("text.txt", b"words " * 20_000)
    return quantize(
        place.decoder, place, "--method", "gptq", "--calibration", text, "--seq-len", 32, "--num-samples", 2
    )


_RECORDS = {
    "number": b'{"text": 1}\n',
    "array": b"[1]\n",
    "cut": b'{"text": "a\n',
    "long-integer": b'{"text": ' + b"9" * 5000 + b"}\n",
    "deep": b"[" * 100_000 + b"\n",
}


@fault("C10", 3, "text.jsonl", "line 1", each=_RECORDS)
def calibration_records(place: Place, content: bytes) -> list[Any]:
    text = place.write("text.jsonl", content)
    return quantize(place.decoder, place, "--method", "gptq", "--calibration", text)


@fault("C11", 5, "`x`", "input_ids")
def calibration_of_unknown_inputs(place: Place) -> list[Any]:
    model = graphs.save(place.folder / "model")
    tiny_decoder.save_tokenizer(model.parent)
    text = place.write("text.txt", b"words " * 100)
    return quantize(model, place, "--method", "gptq", "--calibration", text, "--seq-len", 16)


def _with_fixed_axis(place: Place, name: str, axis: int, size: int) -> Path:
    """Write the tiny decoder with an axis of an input, which is free, of one size."""
    model = place.own(place.decoder)
    proto = onnx.load(model / "model.onnx")
    (value,) = (value for value in proto.graph.input if value.name == name)
    value.type.tensor_type.shape.dim[axis].dim_value = size
    onnx.save(proto, model / "model.onnx")
    manifest = json.loads((model / "llmfast.json").read_text())
    write_manifest(model, Manifest("text-generation", architecture=manifest["architecture"], graphs=manifest["graphs"]))
    return model


_AXES = {"batch": ("input_ids", 0, 4), "seq": ("input_ids", 1, 8), "past": ("past_key_values.0.key", 2, 16)}


@fault("C12", 5, "is fixed at", each={name: (name, *case) for name, case in _AXES.items()})
def fixed_axis(place: Place, case: tuple[str, str, int, int]) -> list[Any]:
    return ["infer", _with_fixed_axis(place, *case[1:]), "-p", "xxx", "--max-tokens", 2]


@fault("C12", 5, "axis 1", "`input_ids` is fixed at 4", alone=True)
def fixed_axis_of_an_encoder(place: Place) -> list[Any]:
    model = place.folder / "model"
    model.mkdir()
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=1),
        helper.make_node("Unsqueeze", ["x", "two"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", 4])]
    outputs = [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 4, 1])]
    two = numpy_helper.from_array(np.array([2]), "two")
    proto = helper.make_model(helper.make_graph(nodes, "graph", inputs, outputs, [two]), ir_version=10)
    proto.opset_import[0].version = 21
    graphs.save(model, proto)
    tiny_decoder.save_tokenizer(model)
    write_manifest(model, Manifest("token-classification", graphs={"model": {"file": "model.onnx"}}))
    return ["infer", model, "-p", "a longer text"]


@fault("C13", 3, "199 tokens", f"{tiny_decoder.CONTEXT}")
def long_prompt(place: Place) -> list[Any]:
    return ["infer", place.decoder, "-p", "x" * 199]


@fault("C13", 2, "--max-tokens", each={"0": 0, "negative": -1})
def max_tokens(place: Place, count: int) -> list[Any]:
    return ["infer", place.decoder, "-p", "x", "--max-tokens", count]


@fault("C13", 0)
def max_tokens_beyond_the_context(place: Place) -> list[Any]:
    return ["infer", place.decoder, "-p", "x", "--max-tokens", 10**9]


@fault("C13", 3, "empty")
def empty_prompt(place: Place) -> list[Any]:
    return ["infer", place.decoder, "-p", "", "--raw"]


@fault("C14", 7, "export differs from PyTorch", "allowed")
def parity(place: Place) -> list[Any]:
    place.patch.setattr("llmfast.export.traced_parity.ABSOLUTE_TOLERANCE", 0.0)
    place.patch.setattr("llmfast.export.traced_parity.RELATIVE_TOLERANCE", 0.0)
    from tests.tiny_encoder import save_encoder

    save_encoder(place.folder / "encoder")
    return ["export", place.folder / "encoder", "-o", place.output]


@fault("C15", 7, "gate missed", "kld")
def gate(place: Place) -> list[Any]:
    text = place.write("text.txt", b"some words to compare on " * 40)
    gates = ["--data", text, "--data-samples", 1, "--max-kld", 1e-9, "--seq-len", 32]
    return ["quantize", place.decoder, "-o", place.output, "--scheme", "int4", *gates]


@fault("C16", 5, "CUDAExecutionProvider", each={"infer": ["infer", "-p", "x"], "bench": ["bench", "-p", 4, "-n", 2]})
def provider(place: Place, arguments: list[Any]) -> list[Any]:
    return [arguments[0], place.decoder, *arguments[1:], "--provider", "cuda"]


@fault("C17", 5, "`mamba`", "supported: ", "llama")
def architecture(place: Place) -> list[Any]:
    source = place.own(place.checkpoint())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    return ["export", source, "-o", place.output]


@fault("C17", 5, "does not load", "Nonsense")
def operator(place: Place) -> list[Any]:
    model = place.folder / "model"
    model.mkdir()
    proto = graphs.model([graphs.node("Nonsense", ["x"], ["z"])])
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    graphs.save(model, proto)
    return quantize(model, place)
