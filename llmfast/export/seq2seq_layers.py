"""What an encoder and a decoder are made of: embeddings, linear layers, norms, MLPs, as nodes of an ONNX graph."""

from collections.abc import Callable
from typing import Any

import numpy as np

from llmfast.errors import InputError
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.encoder_decoder import EncoderDecoder, Stack
from llmfast.graph.builder import CONTRIB, GraphBuilder

_EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
_PARAMETERS = ("weight", "bias")
# A sublayer takes the hidden state and returns its output, and the bias that is left to add.
Sublayer = Callable[[str], tuple[str, str]]


class StackWriter:
    """Writes the layers of one stack; every method returns the names of the values it makes.

    Attributes:
        name: `encoder` or `decoder`.
        stack: its sizes.
    """

    name: str
    stack: Stack

    def __init__(self, checkpoint: SafetensorsCheckpoint, description: EncoderDecoder, graph: GraphBuilder) -> None:
        self.checkpoint = checkpoint
        self.description = description
        self.graph = graph

    def _read(self, *names: str) -> np.ndarray:
        """Read weights and stack them along their output features."""
        return self.checked(*(self.description.spell(name) for name in names))

    def checked(self, *names: str) -> np.ndarray:
        arrays = [self.checkpoint.read(name) for name in names]
        for name, array in zip(names, arrays, strict=True):
            if not np.isfinite(array).all():
                raise InputError(
                    f"weight `{name}` of `{self.checkpoint.path}` has values that are NaN or infinite",
                    "the checkpoint is damaged or its training diverged",
                )
        return np.concatenate(arrays)

    def embedding(self) -> tuple[str, np.ndarray]:
        """Return the name and the values of the table of tokens [vocab, hidden]."""
        own = (f"{self.name}.embed_tokens",)
        names = [f"{name}.weight" for name in (_EMBEDDINGS if self.description.shared_embeddings else own)]
        # Tied weights are saved under any one of their names.
        spelled = [self.description.spell(name) for name in names]
        found = next((name for name in spelled if self.checkpoint.has(name)), spelled[0])
        return names[0], self.checked(found)

    def embed(self, table: str, start: str, end: str) -> str:
        """Return the embedded tokens, with their positions unless these are relative."""
        graph, description, name = self.graph, self.description, self.name
        hidden = graph.op("Gather", [table, "input_ids"], f"{name}.embed_tokens")
        if description.embedding_scale != 1.0:
            scale = graph.constant("computed.embedding_scale", description.embedding_scale, np.float32)
            hidden = graph.op("Mul", [hidden, scale], f"{name}.embed_tokens.scaled")
        if (positions := self._positions()) is not None:
            rows = graph.op("Slice", [positions, start, end, graph.constant("axis.0", [0])], f"{name}.positions")
            hidden = graph.op("Add", [hidden, rows], f"{name}.embedded")
        if description.embedding_norm:
            hidden = self._norm(f"{name}.layernorm_embedding", hidden)
        return hidden

    def listen(self, features: str) -> str:
        """Return the hidden states of a spectrogram [batch, mel_bins, frames], two frames each, with positions."""
        graph, name = self.graph, self.name
        for part, stride in (("conv1", 1), ("conv2", 2)):
            weights = [graph.weight(f"{name}.{part}.{one}", self._read(f"{name}.{part}.{one}")) for one in _PARAMETERS]
            sizes: dict[str, Any] = {"kernel_shape": [3], "pads": [1, 1], "strides": [stride]}
            heard = graph.op("Conv", [features, *weights], f"{name}.{part}", **sizes)
            features = self._activate(heard, f"{name}.{part}")
        hidden = graph.op("Transpose", [features], f"{name}.frames", perm=[0, 2, 1])
        positions = self._positions()
        assert positions is not None
        return graph.op("Add", [hidden, positions], f"{name}.embedded")

    def _positions(self) -> str | None:
        description = self.description
        if description.positions is not None:
            return self.graph.weight("computed.positions", description.positions)
        if description.learned_positions is not None:
            name = f"{self.name}.embed_positions.weight"
            return self.graph.weight(name, self._read(name)[description.learned_positions :])
        return None

    def linear(self, name: str, hidden: str, parts: tuple[str, ...] = ()) -> str:
        """Multiply by the weight of one projection, or of several that share their input, and add the bias."""
        product, bias = self.product(name, hidden, parts)
        return self.graph.op("Add", [product, bias], f"{name}.biased") if bias else product

    def product(self, name: str, hidden: str, parts: tuple[str, ...] = ()) -> tuple[str, str]:
        """Return the product with the weight `[K, N]`, and the bias, which is left to add."""
        sources = [f"{name.rpartition('.')[0]}.{part}" for part in parts] or [name]
        weight = self.graph.weight(f"{name}.weight", self._read(*[f"{source}.weight" for source in sources]).T)
        product = self.graph.op("MatMul", [hidden, weight], name)
        if not self.description.bias:
            return product, ""
        biases = [self._bias(source) for source in sources]
        return product, self.graph.weight(f"{name}.bias", np.concatenate(biases))

    def _bias(self, source: str) -> np.ndarray:
        if source.endswith("k_proj") and not self.description.key_bias:
            return np.zeros(self.stack.width, np.float32)
        return self._read(f"{source}.bias")

    def _norm_weights(self, name: str) -> list[str]:
        weight = self._read(f"{name}.weight")
        if name == "decoder.layer_norm":
            weight = weight * np.float32(self.description.logits_scale)
        weights = [self.graph.weight(f"{name}.weight", weight)]
        if not self.description.rms_norm:
            weights.append(self.graph.weight(f"{name}.bias", self._read(f"{name}.bias")))
        return weights

    def _norm(self, name: str, hidden: str) -> str:
        operator = "SimplifiedLayerNormalization" if self.description.rms_norm else "LayerNormalization"
        epsilon = self.description.norm_epsilon
        return self.graph.op(operator, [hidden, *self._norm_weights(name)], name, axis=-1, epsilon=epsilon)

    def _skip_norm(self, name: str, residual: str, sublayer: tuple[str, str]) -> tuple[str, str]:
        """Return the norm of residual + sublayer + bias, and what the next sublayer's output is added to."""
        hidden, bias = sublayer
        if bias:
            hidden = self.graph.op("Add", [hidden, bias], f"{hidden}.biased")
        # Not SkipLayerNormalization: on the CPU it takes ten times as long as these two.
        total = self.graph.op("Add", [residual, hidden], f"{name}.residual")
        self._norm(name, total)
        return name, total if self.description.pre_norm else name

    def run(self, hidden: str, sublayers: list[tuple[str, Sublayer]]) -> str:
        """Chain the sublayers, each named by its norm, and return the last norm's output."""
        norms = [norm for norm, _ in sublayers]
        residual = hidden
        if self.description.pre_norm:
            hidden = self._norm(norms[0], hidden)
            norms = [*norms[1:], f"{self.name}.layer_norm"]
        for norm, (_, sublayer) in zip(norms, sublayers, strict=True):
            hidden, residual = self._skip_norm(norm, residual, sublayer(hidden))
        return hidden

    def mlp(self, name: str, hidden: str) -> tuple[str, str]:
        graph = self.graph
        if self.description.gated:
            gate = self._activate(self.linear(f"{name}.gate_proj", hidden), name)
            hidden = graph.op("Mul", [gate, self.linear(f"{name}.fc1", hidden)], f"{name}.product")
        else:
            hidden = self._activate(self.linear(f"{name}.fc1", hidden), name)
        return self.product(f"{name}.fc2", hidden)

    def _activate(self, hidden: str, name: str) -> str:
        operator, domain, attributes = {
            "gelu": ("Gelu", CONTRIB, {}),
            "gelu_new": ("FastGelu", CONTRIB, {}),
            "relu": ("Relu", "", {}),
            "silu": ("QuickGelu", CONTRIB, {"alpha": 1.0}),
            "swish": ("QuickGelu", CONTRIB, {"alpha": 1.0}),
        }[self.description.activation]
        return self.graph.op(operator, [hidden], f"{name}.act", domain, **attributes)

    def attention_settings(self) -> dict[str, Any]:
        return {} if self.description.scaled_attention else {"scale": 1.0}

    def split(self, name: str, packed: str, parts: str) -> list[str]:
        sizes = self.graph.constant(f"{self.name}.{parts}.sizes", [self.stack.width] * len(parts))
        return self.graph.ops("Split", [packed, sizes], [f"{name}.{part}" for part in parts], axis=-1)

    def position_bias(self, start: str, end: str) -> str:
        """Return T5's bias [1, heads, query, key] for queries from `start` on and keys from 0 on; empty without."""
        relative = self.description.relative_positions
        if relative is None:
            return ""
        graph, name = self.graph, f"{self.name}.position_bias"
        scalar, one = graph.constant("shape.scalar", np.empty(0)), graph.constant("scalar.1", 1)
        zero = graph.constant("scalar.0", 0)
        last = graph.op("Reshape", [end, scalar], f"{name}.end")
        keys = graph.op("Range", [zero, last, one], f"{name}.keys")
        first = graph.op("Reshape", [start, scalar], f"{name}.start")
        queries = graph.op("Range", [first, last, one], f"{name}.queries")
        column = graph.op("Unsqueeze", [queries, graph.constant("axis.1", [1])], f"{name}.column")
        limit = len(relative.buckets[self.name]) // 2
        low, high = graph.constant(f"{name}.low", -limit), graph.constant(f"{name}.high", limit)
        distance = graph.op("Clip", [graph.op("Sub", [keys, column], f"{name}.far"), low, high], f"{name}.distance")
        buckets = graph.weight(f"computed.{self.name}.buckets", relative.buckets[self.name])
        bucket = graph.op("Gather", [buckets, graph.op("Add", [distance, high], f"{name}.index")], f"{name}.bucket")
        table = self.checked(relative.weights[self.name]).T
        heads = graph.op("Gather", [graph.weight(f"{name}.weight", table), bucket], f"{name}.heads", axis=1)
        return graph.op("Unsqueeze", [heads, graph.constant("axis.0", [0])], name)
