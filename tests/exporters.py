"""Tiny decoders in the forms that other exporters write them, after real files of theirs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper
from safetensors.numpy import load_file

BLOCK = 32
CONTRIB = "com.microsoft"


def write_genai(checkpoint: Path, folder: Path, *, bits: int = 32, positions: bool = False) -> Path:
    """Write a llama as onnxruntime-genai's model builder 0.18 does for the CPU.

    Args:
        checkpoint: of a llama with tied embeddings.
        folder: to be made; gets model.onnx, model.onnx.data, genai_config.json and the tokenizer.
        bits: 32, 16 (weights, cache and logits) or 4 (MatMulNBits).
        positions: rotate outside attention, by the input `position_ids`, as for other providers.
    """
    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    model = _Genai(config, load_file(checkpoint / "model.safetensors"), bits, positions).model()
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    facts = {"context_length": 512, "eos_token_id": config["eos_token_id"], "type": "llama", "vocab_size": 320}
    (folder / "genai_config.json").write_text(json.dumps({"model": facts}), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return folder


def round_to_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 4-bit codes uint8 [N, K / 32, 32] and scales [N, K / 32] of a weight [N, K]; the zero point is 8."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scales = np.abs(blocks).max(-1) / 7
    return np.clip(np.rint(blocks / scales[..., None]) + 8, 0, 15).astype(np.uint8), scales


def rounded(weight: np.ndarray) -> np.ndarray:
    """Return the weight [N, K] that the codes stand for."""
    codes, scales = round_to_blocks(weight)
    return ((codes.astype(np.float32) - 8) * scales[..., None]).reshape(weight.shape)


class _Genai:
    def __init__(self, config: dict[str, Any], weights: dict[str, np.ndarray], bits: int, positions: bool) -> None:
        self.config, self.weights, self.bits, self.positions = config, weights, bits, positions
        self.float = np.float16 if bits == 16 else np.float32
        self.type = helper.np_dtype_to_tensor_dtype(np.dtype(self.float))
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_size = config["hidden_size"] // self.heads
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[TensorProto] = []
        self.shapes: list[onnx.ValueInfoProto] = []

    def node(self, op_type: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = outputs[0].removesuffix("/output_0")
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name, domain=domain, **attributes))
        return outputs[0]

    def store(self, name: str, array: np.ndarray) -> str:
        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def linear(self, path: str, hidden: str, parts: list[str], output: str = "") -> str:
        weight = np.concatenate([self.weights[part] for part in parts])
        dotted = path.strip("/").replace("/", ".")
        output = output or f"{path}/MatMul/output_0"
        if self.bits == 4:
            codes, scales = round_to_blocks(weight)
            packed = codes[..., ::2] | codes[..., 1::2] << 4
            names = [
                self.store(f"{dotted}.MatMul.weight_Q4", packed),
                self.store(f"{dotted}.MatMul.weight_scales", scales),
            ]
            sizes = {"N": weight.shape[0], "K": weight.shape[1], "bits": 4, "block_size": BLOCK}
            self.node("MatMulNBits", [hidden, *names], [output], CONTRIB, **sizes)
        else:
            self.node("MatMul", [hidden, self.store(f"{dotted}.MatMul.weight", weight.T.astype(self.float))], [output])
        shape = ["batch_size", "sequence_length", len(weight)]
        self.shapes.append(helper.make_tensor_value_info(output, self.type, shape))
        return output

    def lengths(self) -> tuple[str, str]:
        base = "/model/attn_mask_reformat/attn_mask_subgraph"
        one = numpy_helper.from_array(np.array([1]))
        row = self.node("Constant", [], ["/model/constants/INT64/[1]"], value=one)
        total = self.node("ReduceSum", ["attention_mask", row], [f"{base}/ReduceSum/output_0"], keepdims=0)
        past = self.node("Sub", [total, row], [f"{base}/Sub/output_0"])
        seqlens = self.node("Cast", [past], [f"{base}/Sub/Cast/output_0"], to=TensorProto.INT32)
        shape = self.node("Shape", ["attention_mask"], [f"{base}/Shape/output_0"])
        index = self.node("Constant", [], ["/model/constants/INT64/1"], value=numpy_helper.from_array(np.array(1)))
        longest = self.node("Gather", [shape, index], [f"{base}/Gather/output_0"], axis=0)
        return seqlens, self.node("Cast", [longest], [f"{base}/Gather/Cast/output_0"], to=TensorProto.INT32)

    def rotate(self, path: str, value: str, heads: int) -> str:
        inputs = [value, "position_ids", "cos_cache", "sin_cache"]
        output = f"{path}/RotaryEmbedding/output_0"
        return self.node("RotaryEmbedding", inputs, [output], CONTRIB, num_heads=heads)

    def attention(self, layer: int, hidden: str, lengths: tuple[str, str]) -> str:
        base, source = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"
        parts = [f"{source}.{part}_proj.weight" for part in "qkv"]
        if self.positions:
            queries = self.linear(f"{base}/q_proj", hidden, parts[:1])
            keys, values = (self.linear(f"{base}/{p}_proj", hidden, [w]) for p, w in zip("kv", parts[1:], strict=True))
            queries = self.rotate(f"{base}/q_rotary", queries, self.heads)
            projected = [queries, self.rotate(f"{base}/k_rotary", keys, self.kv_heads), values]
        else:
            projected = [self.linear(f"{base}/qkv_proj", hidden, parts), "", ""]
        tables = ["", ""] if self.positions else ["cos_cache", "sin_cache"]
        cache = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        mixed = self.node(
            "GroupQueryAttention",
            [*projected, *cache, *lengths, *tables, "", "", ""],
            [f"{base}/GroupQueryAttention/output_0", f"present.{layer}.key", f"present.{layer}.value"],
            CONTRIB,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=self.head_size**-0.5,
            local_window_size=-1,
            softcap=0.0,
            do_rotary=int(not self.positions),
            rotary_interleaved=0,
        )
        return self.linear(f"{base}/o_proj", mixed, [f"{source}.o_proj.weight"])

    def mlp(self, layer: int, hidden: str) -> str:
        base, source = f"/model/layers.{layer}/mlp", f"model.layers.{layer}.mlp"
        gate, up = (
            self.linear(f"{base}/{part}_proj", hidden, [f"{source}.{part}_proj.weight"]) for part in ("gate", "up")
        )
        sigmoid = self.node("Sigmoid", [gate], [f"{base}/act_fn/Sigmoid/output_0"])
        silu = self.node("Mul", [gate, sigmoid], [f"{base}/act_fn/Mul/output_0"])
        product = self.node("Mul", [silu, up], [f"{base}/Mul/output_0"])
        return self.linear(f"{base}/down_proj", product, [f"{source}.down_proj.weight"])

    def norm(self, path: str, residual: str, hidden: str, weight: str) -> tuple[str, str]:
        outputs = [f"{path}/output_0", "", "", f"{path}/output_3"]
        inputs = [residual, hidden, self.store(f"{path.strip('/').replace('/', '.')}.weight", self.vector(weight))]
        self.node("SkipSimplifiedLayerNormalization", inputs, outputs, CONTRIB, epsilon=self.config["rms_norm_eps"])
        return outputs[0], outputs[3]

    def vector(self, name: str) -> np.ndarray:
        return self.weights[name].astype(self.float)

    def embed(self) -> str:
        table = self.weights["model.embed_tokens.weight"]
        if self.bits == 4:
            table = self.store("model.embed_tokens.weight", table)
        else:  # the head's matrix
            table = self.node(
                "Transpose", ["lm_head.MatMul.weight"], ["/model/embed_tokens/Transpose/output_0"], perm=[1, 0]
            )
        return self.node("Gather", [table, "input_ids"], ["/model/embed_tokens/Gather/output_0"])

    def model(self) -> onnx.ModelProto:
        layers = self.config["num_hidden_layers"]
        frequencies = 10000.0 ** (-np.arange(0, self.head_size, 2) / self.head_size)
        angles = np.outer(np.arange(self.config["max_position_embeddings"]), frequencies)
        self.store("cos_cache", np.cos(angles).astype(self.float))
        self.store("sin_cache", np.sin(angles).astype(self.float))
        lengths = self.lengths()
        residual = self.embed()
        first = self.store(
            "model.layers.0.input_layernorm.weight", self.vector("model.layers.0.input_layernorm.weight")
        )
        hidden = self.node(
            "SimplifiedLayerNormalization",
            [residual, first],
            ["/model/layers.0/input_layernorm/output_0"],
            axis=-1,
            epsilon=self.config["rms_norm_eps"],
            stash_type=1,
        )
        for layer in range(layers):
            base, source = f"/model/layers.{layer}", f"model.layers.{layer}"
            mixed = self.attention(layer, hidden, lengths)
            after = f"{source}.post_attention_layernorm.weight"
            hidden, residual = self.norm(f"{base}/post_attention_layernorm", residual, mixed, after)
            following = (
                f"model.layers.{layer + 1}.input_layernorm.weight" if layer < layers - 1 else "model.norm.weight"
            )
            place = f"/model/layers.{layer + 1}/input_layernorm"
            hidden, residual = self.norm(place, residual, self.mlp(layer, hidden), following)
        self.linear("lm_head", hidden, ["model.embed_tokens.weight"], "logits")
        return self.assemble()

    def assemble(self) -> onnx.ModelProto:
        value, axes = helper.make_tensor_value_info, ["batch_size", "sequence_length"]
        layers = range(self.config["num_hidden_layers"])

        def caches(prefix: str, length: str) -> list[onnx.ValueInfoProto]:
            shape = ["batch_size", self.kv_heads, length, "kv_cache_dim"]  # the builder leaves the last open
            return [value(f"{prefix}.{n}.{part}", self.type, shape) for part in ("key", "value") for n in layers]

        inputs = [
            value("input_ids", TensorProto.INT64, axes),
            value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
            *([value("position_ids", TensorProto.INT64, axes)] if self.positions else []),
            *caches("past_key_values", "past_sequence_length"),
        ]
        outputs = [
            value("logits", self.type, [*axes, self.config["vocab_size"]]),
            *caches("present", "total_sequence_length"),
        ]
        shapes = [info for info in self.shapes if info.name != "logits"]
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, self.stored, value_info=shapes)
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="onnxruntime-genai")


def export_growing(checkpoint: Path, with_past: bool = True) -> onnx.ModelProto:
    """Export a decoder with torch.onnx: `attention_mask`, and a cache that every step makes longer."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    head_size = model.config.hidden_size // model.config.num_attention_heads

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.eval()

        def forward(self, input_ids, attention_mask, *past):
            cache = DynamicCache([*zip(past[::2], past[1::2], strict=True)]) if past else DynamicCache()
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
            return (out.logits, *[part for one in out.past_key_values.layers for part in (one.keys, one.values)])

    past = [torch.randn(1, heads, 5, head_size) for _ in range(2 * layers if with_past else 0)]
    dynamic = torch.export.Dim.DYNAMIC
    names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    mask = torch.ones(1, 8 if with_past else 3, dtype=torch.long)
    program = torch.onnx.export(
        Step(),
        (torch.randint(0, 300, (1, 3)), mask, *past),
        dynamo=True,
        verbose=False,
        opset_version=23,
        dynamic_shapes=({1: dynamic}, {1: dynamic}, *([tuple({2: dynamic} for _ in past)] if past else [])),
        input_names=["input_ids", "attention_mask", *[f"past_key_values.{name}" for name in names if with_past]],
        output_names=["logits", *[f"present.{name}" for name in names]],
    )
    return program.model_proto


def merge(with_past: onnx.ModelProto, without_past: onnx.ModelProto) -> onnx.ModelProto:
    """Merge two exports as optimum's `merge_decoders` does: one `If` over `use_cache_branch`."""
    branches, weights = [], []
    for prefix, model in (("with.", with_past), ("without.", without_past)):
        inputs = {value.name for value in model.graph.input}
        graph = compose.add_prefix_graph(model.graph, prefix, rename_inputs=False)
        weights += graph.initializer
        del graph.input[:], graph.initializer[:], graph.value_info[:]
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = name.removeprefix(prefix) if name.removeprefix(prefix) in inputs else name
        branches.append(graph)
    outputs = [value.name for value in with_past.graph.output]
    node = helper.make_node(
        "If", ["use_cache_branch"], outputs, name="optimum::if", then_branch=branches[0], else_branch=branches[1]
    )
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    inputs = [*with_past.graph.input, flag]
    graph = helper.make_graph([node], "merged", inputs, with_past.graph.output, weights)
    return helper.make_model(graph, opset_imports=with_past.opset_import, ir_version=10, producer_name="optimum-onnx")


def write_unmasked(path: Path) -> dict[str, np.ndarray]:
    """Write an attention without causal mask, as a trace of one token at a time has it; return its weights."""
    rng = np.random.default_rng(0)
    weights = {
        "embedding": rng.normal(0, 1, (32, 8)).astype(np.float32),
        **{name: rng.normal(0, 0.5, (8, 8)).astype(np.float32) for name in ("query", "key", "value")},
        "head": rng.normal(0, 1, (8, 32)).astype(np.float32),
    }
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [node("Gather", ["embedding", "input_ids"], ["embedded"])]
    for part in ("query", "key", "value"):
        nodes.append(node("MatMul", ["embedded", part], [f"{part}.flat"]))
        nodes.append(node("Unsqueeze", [f"{part}.flat", "one"], [f"{part}.head"]))
    nodes += [
        node("Concat", ["past_key_values.0.key", "key.head"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "value.head"], ["present.0.value"], axis=2),
        node("Transpose", ["present.0.key"], ["keys"], perm=[0, 1, 3, 2]),
        node("MatMul", ["query.head", "keys"], ["scores"]),
        node("Softmax", ["scores"], ["shares"], axis=-1),
        node("MatMul", ["shares", "present.0.value"], ["mixed"]),
        node("Squeeze", ["mixed", "one"], ["hidden"]),
        node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    cache = [("past_key_values", "past"), ("present", "total")]
    past, present = (
        [info(f"{prefix}.0.{part}", TensorProto.FLOAT, [1, 1, length, 8]) for part in ("key", "value")]
        for prefix, length in cache
    )
    inputs = [info("input_ids", TensorProto.INT32, [1, "seq"]), *past]
    outputs = [info("logits", TensorProto.FLOAT, [1, "seq", 32]), *present]
    stored = [numpy_helper.from_array(array, name) for name, array in (weights | {"one": np.array([1])}).items()]
    graph = helper.make_graph(nodes, "unmasked", inputs, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return weights
