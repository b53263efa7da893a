"""The encoder-decoder Transformer of "Attention Is All You Need", as one would write it by hand.

    llmfast export --module recipes/transformer.py:factory -o transformer
    llmfast quantize transformer -o transformer-int8 --scheme int8
    llmfast bench transformer transformer-int8

Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
"""

import math

import torch
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Every position of `query` looks at the positions of `memory` where `mask` is true."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, length, head_size]
            for project, x in ((self.q_proj, query), (self.k_proj, memory), (self.v_proj, memory))
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(-2))


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each added to its input and normalized."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = MultiHeadAttention(width, heads), FeedForward(width, inner)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, mask))
        return self.norm2(x + self.feed_forward(x))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and feed-forward."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention, self.cross_attention = MultiHeadAttention(width, heads), MultiHeadAttention(width, heads)
        self.feed_forward = FeedForward(width, inner)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor, causal: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, causal))
        x = self.norm2(x + self.cross_attention(x, memory, mask))
        return self.norm3(x + self.feed_forward(x))


class Transformer(nn.Module):
    """Token ids of two texts to the logits of every next token of the second one; id 0 pads the first."""

    def __init__(
        self,
        vocab: int = 8000,
        width: int = 256,
        heads: int = 8,
        inner: int = 1024,
        layers: int = 3,
        longest: int = 512,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.register_buffer("positions", sinusoids(longest, width), persistent=False)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, inner) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, inner) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * math.sqrt(self.embedding.embedding_dim) + self.positions[: ids.shape[1]]

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        mask = (source != 0)[:, None, None, :]
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory, mask)
        length = torch.arange(target.shape[1])
        causal = (length[:, None] >= length)[None, None]
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory, causal, mask)
        return {"logits": self.head(x)}


def sinusoids(length: int, width: int) -> Tensor:
    """Return the positions' codes, [length, width]: sines and cosines of falling frequency."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def factory():
    """Return a module, example inputs, and the axes whose sizes are free."""
    model = Transformer()
    nn.init.normal_(model.embedding.weight, std=model.embedding.embedding_dim**-0.5)
    source = torch.randint(1, 8000, (2, 16))
    source[1, 12:] = 0
    examples = {"source": source, "target": torch.randint(1, 8000, (2, 12))}
    axes = {"source": {0: "batch", 1: "source_length"}, "target": {0: "batch", 1: "target_length"}}
    return model, examples, axes
