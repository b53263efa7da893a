"""A decoder of one layer in llmfast's own graph, and what it computes in float64."""

import json

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, pre_tokenizers

from llmfast.bundle import Manifest, write_manifest
from llmfast.infer.batch import Request
from llmfast.infer.engine import Engine
from llmfast.infer.generate import Generation, finish, generate
from llmfast.tokenizer import Tokenizer

# 256 bytes and 3 special tokens; the rows above them are padding, as in many real models.
TOKENS, VOCAB = 259, 264
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, CONTEXT = 16, 2, 1, 16, 96
BOS, EOS = 256, 257


def make_weights():
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (VOCAB, HIDDEN),
        "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_SIZE),
        "output": (HEADS * HEAD_SIZE, HIDDEN),
        "head": (HIDDEN, VOCAB),
    }
    weights = {name: rng.normal(0, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}
    angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    return weights | {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def write_decoder(path, weights):
    node, value = helper.make_node, helper.make_tensor_value_info
    past = ["past_key_values.0.key", "past_key_values.0.value"]
    present = ["present.0.key", "present.0.value"]
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["embedded"]),
        node("MatMul", ["embedded", "qkv"], ["packed"]),
        node(
            "GroupQueryAttention",
            ["packed", "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"],
            ["attention", *present],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        ),
        node("MatMul", ["attention", "output"], ["projected"]),
        node("Add", ["embedded", "projected"], ["hidden"]),
        node("Neg", ["num_logits"], ["start"]),
        node("Slice", ["hidden", "start", "end", "axis"], ["last"]),
        node("MatMul", ["last", "head"], ["logits"]),
    ]
    constants = weights | {"end": np.array([np.iinfo(np.int64).max]), "axis": np.array([1])}
    cache = ["batch", KV_HEADS, "past_capacity", HEAD_SIZE]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            value("input_ids", TensorProto.INT64, ["batch", "seq"]),
            value("seqlens_k", TensorProto.INT32, ["batch"]),
            value("total_sequence_length", TensorProto.INT32, []),
            value("num_logits", TensorProto.INT64, [1]),
            *[value(name, TensorProto.FLOAT, cache) for name in past],
        ],
        [
            value("logits", TensorProto.FLOAT, ["batch", "num_logits", VOCAB]),
            *[value(name, TensorProto.FLOAT, cache) for name in present],
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def reference_logits(weights, ids):
    """Return the decoder's logits at every position, in float64 and without a cache: [n, VOCAB]."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    embedded = w["embedding"][ids]
    packed = (embedded @ w["qkv"]).reshape(len(ids), HEADS + 2 * KV_HEADS, HEAD_SIZE)
    left, right = np.split(packed[:, : HEADS + KV_HEADS], 2, axis=-1)
    cos, sin = w["cos"][: len(ids), None], w["sin"][: len(ids), None]
    rotated = np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    queries, keys, values = rotated[:, :HEADS], rotated[:, HEADS], packed[:, HEADS + KV_HEADS]
    scores = np.einsum("qhd,kd->hqk", queries, keys) / np.sqrt(HEAD_SIZE)
    scores[:, np.triu(np.ones((len(ids), len(ids)), bool), 1)] = -np.inf
    attention = np.exp(scores - scores.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,kd->qhd", attention, values).reshape(len(ids), -1)
    return (embedded + mixed @ w["output"]) @ w["head"]


def save_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def write_bundle(folder, companions=None):
    """Write the decoder as a bundle, with a tokenizer of bytes; `companions` are more files, name -> text."""
    write_decoder(folder / "model.onnx", make_weights())
    save_tokenizer(folder)
    for name, text in (companions or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    architecture = {"context_length": CONTEXT, "vocab_size": VOCAB}
    graphs = {"model": {"file": "model.onnx", "inputs": [], "outputs": []}}
    write_manifest(folder, Manifest("text-generation", architecture=architecture, graphs=graphs))
    return folder


def answer_alone(engine: Engine, tokenizer: Tokenizer, request: Request) -> Generation:
    """Answer a request with no other beside it."""
    pieces = generate(
        engine,
        tokenizer,
        request.prompt_ids,
        request.max_tokens,
        request.sampling,
        request.stop,
        tokenizer.eos_ids,
    )
    return finish(pieces)
