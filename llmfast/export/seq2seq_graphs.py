"""The direct route for encoder-decoders: two ONNX graphs written from config and weights, without tracing.

The encoder gives the keys and values that every decoder layer looks the source up by: they are computed
once. The decoder follows the decoder contract: GroupQueryAttention in place over one slab. Its rows may be
a multiple of the encoder's, beams for instance: those of one source follow one another and look up the same
keys, which are never repeated.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.encoder_decoder import EncoderDecoder, Stack
from llmfast.export.seq2seq_layers import StackWriter, Sublayer
from llmfast.graph.builder import CONTRIB, GraphBuilder
from llmfast.graph.feeds import CROSS, FEATURES, PAST
from llmfast.graph.weights import WeightFile


def write_encoder_decoder(
    checkpoint: SafetensorsCheckpoint, description: EncoderDecoder, folder: Path, advance: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Write `encoder.onnx`, `decoder.onnx` and the data they share into `folder`.

    Args:
        checkpoint: where the weights are read.
        description: sizes and differences of the architecture.
        folder: an empty staging directory.
        advance: called once per layer.

    Returns:
        The manifest's graphs: role -> file, inputs, outputs.
    """
    weights = WeightFile(folder)
    models = {
        "encoder": _EncoderWriter(checkpoint, description, GraphBuilder(weights)).write(advance),
        "decoder": _DecoderWriter(checkpoint, description, GraphBuilder(weights)).write(advance),
    }
    weights.save_all(models)
    return {
        role: {
            "file": f"{role}.onnx",
            "inputs": [value.name for value in model.graph.input],
            "outputs": [value.name for value in model.graph.output],
        }
        for role, model in models.items()
    }


class _EncoderWriter(StackWriter):
    name = "encoder"

    def write(self, advance: Callable[[], None]) -> onnx.ModelProto:
        graph, description = self.graph, self.description
        self.stack = description.encoder
        mask = bias = ""
        if description.source is None:
            start = graph.constant("axis.0", [0])
            end = graph.op("Shape", ["input_ids"], "source", start=1, end=2)
            hidden = self.embed(graph.weight(*self.embedding()), start, end)
            mask = graph.op("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
            bias = self.position_bias(start, end)
        else:
            hidden = self.listen(FEATURES)

        def attend(name: str) -> Sublayer:
            return lambda hidden: self._attend(name, hidden, mask, bias, advance)

        def feed_forward(name: str) -> Sublayer:
            return lambda hidden: self.mlp(name, hidden)

        sublayers: list[tuple[str, Sublayer]] = []
        for name in (f"encoder.layers.{layer}" for layer in range(self.stack.num_layers)):
            sublayers.append((f"{name}.self_attn_layer_norm", attend(f"{name}.self_attn")))
            sublayers.append((f"{name}.final_layer_norm", feed_forward(name)))
        self._write_cross_keys(self.run(hidden, sublayers))
        return graph.build("encoder", self._inputs(), cross_values(description.decoder))

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        source = self.description.source
        if source is not None:
            shape: list[str | int] = ["batch", source.mel_bins, source.frames]
            return [helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, shape)]
        return [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "source"])
            for name in ("input_ids", "attention_mask")
        ]

    def _attend(self, name: str, hidden: str, mask: str, bias: str, advance: Callable[[], None]) -> tuple[str, str]:
        packed = self.linear(f"{name}.qkv_proj", hidden, ("q_proj", "k_proj", "v_proj"))
        inputs = [*self.split(name, packed, "qkv"), "", mask, bias]
        settings = self.attention_settings()
        self.graph.op("MultiHeadAttention", inputs, name, CONTRIB, num_heads=self.stack.num_heads, **settings)
        advance()
        return self.product(f"{name}.out_proj", name)

    def _write_cross_keys(self, hidden: str) -> None:
        """Compute what the decoder's layers look the source up by, [batch, heads, source, head]."""
        graph = self.graph
        self.stack = self.description.decoder
        by_head = graph.constant("heads.split", [0, 0, self.stack.num_heads, self.stack.head_size])
        for layer in range(self.stack.num_layers):
            name = f"decoder.layers.{layer}.encoder_attn"
            packed = self.linear(f"{name}.kv_proj", hidden, ("k_proj", "v_proj"))
            for part, output in zip(self.split(name, packed, "kv"), ("key", "value"), strict=True):
                heads = graph.op("Reshape", [part, by_head], f"{part}.heads")
                graph.op("Transpose", [heads], f"{CROSS}{layer}.{output}", perm=[0, 2, 1, 3])


class _DecoderWriter(StackWriter):
    name = "decoder"

    def write(self, advance: Callable[[], None]) -> onnx.ModelProto:
        graph, description = self.graph, self.description
        self.stack = description.decoder
        total = graph.op("Cast", ["total_sequence_length"], "total.scalar", to=TensorProto.INT64)
        end = graph.op("Reshape", [total, graph.constant("shape.vector", [1])], "total")
        seq = graph.op("Shape", ["input_ids"], "seq", start=1, end=2)
        start = graph.op("Sub", [end, seq], "past")
        table, tokens = self.embedding()
        hidden = self.embed(graph.weight(table, tokens), start, end)
        bias = self.position_bias(start, end)
        self._write_cross_shapes()

        def attend(layer: int, name: str) -> Sublayer:
            return lambda hidden: self._attend(layer, f"{name}.self_attn", hidden, bias, advance)

        def look_up(layer: int, name: str) -> Sublayer:
            return lambda hidden: self._look_up(layer, f"{name}.encoder_attn", hidden)

        def feed_forward(name: str) -> Sublayer:
            return lambda hidden: self.mlp(name, hidden)

        sublayers: list[tuple[str, Sublayer]] = []
        for layer in range(self.stack.num_layers):
            name = f"decoder.layers.{layer}"
            sublayers.append((f"{name}.self_attn_layer_norm", attend(layer, name)))
            sublayers.append((f"{name}.encoder_attn_layer_norm", look_up(layer, name)))
            sublayers.append((f"{name}.final_layer_norm", feed_forward(name)))
        self._head(self.run(hidden, sublayers), table, tokens)
        return graph.build("decoder", self._inputs(), self._outputs())

    def _attend(self, layer: int, name: str, hidden: str, bias: str, advance: Callable[[], None]) -> tuple[str, str]:
        packed = self.linear(f"{name}.qkv_proj", hidden, ("q_proj", "k_proj", "v_proj"))
        past = [f"{PAST}{layer}.key", f"{PAST}{layer}.value"]
        inputs = [packed, "", "", *past, "seqlens_k", "total_sequence_length", *(["", "", "", bias] if bias else [])]
        self.graph.ops(
            "GroupQueryAttention",
            inputs,
            [name, f"present.{layer}.key", f"present.{layer}.value"],
            CONTRIB,
            num_heads=self.stack.num_heads,
            kv_num_heads=self.stack.num_heads,
            do_rotary=0,
            **self.attention_settings(),
        )
        advance()
        return self.product(f"{name}.out_proj", name)

    def _write_cross_shapes(self) -> None:
        graph = self.graph
        batch = graph.op("Shape", ["encoder_attention_mask"], "cross.batch", start=0, end=1)
        rest = graph.constant("cross.rest", [-1, self.stack.width])
        graph.op("Concat", [batch, rest], "cross.by_source", axis=0)
        shape = graph.op("Shape", ["input_ids"], "cross.rows")
        graph.op("Concat", [shape, graph.constant("cross.width", [self.stack.width])], "cross.by_row", axis=0)
        graph.op("Cast", ["encoder_attention_mask"], "cross.mask", to=TensorProto.INT32)

    def _look_up(self, layer: int, name: str, hidden: str) -> tuple[str, str]:
        """Attend to the source: all tokens of all rows of one source are queries to the same keys."""
        graph = self.graph
        queries = graph.op("Reshape", [self.linear(f"{name}.q_proj", hidden), "cross.by_source"], f"{name}.queries")
        keys = [f"{CROSS}{layer}.key", f"{CROSS}{layer}.value"]
        inputs = [queries, *keys, "", "cross.mask"]
        settings = self.attention_settings()
        graph.op("MultiHeadAttention", inputs, name, CONTRIB, num_heads=self.stack.num_heads, **settings)
        rows = graph.op("Reshape", [name, "cross.by_row"], f"{name}.rows")
        return self.product(f"{name}.out_proj", rows)

    def _head(self, hidden: str, table: str, tokens: np.ndarray) -> None:
        graph = self.graph
        start = graph.op("Neg", ["num_logits"], "num_logits.start")
        end, axis = graph.constant("num_logits.end", [np.iinfo(np.int64).max]), graph.constant("axis.1", [1])
        hidden = graph.op("Slice", [hidden, start, end, axis], f"{hidden}.last")
        bias = self._logits_bias()
        logits = "logits.unbiased" if bias is not None else "logits"
        head = self.description.spell("lm_head.weight")
        # Some checkpoints say that the head is tied and hold another one.
        own = self.checked(head) if self.checkpoint.has(head) else None
        if own is None or np.array_equal(own, tokens):
            graph.op("FusedMatMul", [hidden, table], logits, CONTRIB, transB=1)
        else:
            graph.op("MatMul", [hidden, graph.weight("lm_head.weight", own.T)], logits)
        if bias is not None:
            graph.op("Add", [logits, graph.weight("final_logits_bias", bias)], "logits")

    def _logits_bias(self) -> np.ndarray | None:
        name = self.description.spell("final_logits_bias")
        if not self.checkpoint.has(name):
            return None
        bias = self.checked(name).reshape(-1)
        return bias if bias.any() else None

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", "seq"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["rows"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("num_logits", TensorProto.INT64, [1]),
            helper.make_tensor_value_info("encoder_attention_mask", TensorProto.INT64, ["batch", "source"]),
            *cross_values(self.stack),
            *self._cache(PAST, "past"),
        ]

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        shape = ["rows", "logits", self.description.vocab_size]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        return [logits, *self._cache("present.", "total")]

    def _cache(self, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
        return _keys_and_values(prefix, self.stack, "rows", length)


def cross_values(decoder: Stack) -> list[onnx.ValueInfoProto]:
    """Return the keys and values of the source, outputs of the encoder and inputs of the decoder."""
    return _keys_and_values(CROSS, decoder, "batch", "source")


def _keys_and_values(prefix: str, stack: Stack, batch: str, length: str) -> list[onnx.ValueInfoProto]:
    shape = [batch, stack.num_heads, length, stack.head_size]
    return [
        helper.make_tensor_value_info(f"{prefix}{layer}.{part}", TensorProto.FLOAT, shape)
        for layer in range(stack.num_layers)
        for part in ("key", "value")
    ]
