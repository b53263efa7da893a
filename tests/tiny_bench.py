"""Bigram models, their bundles and texts, for the tests of llmfast bench."""

from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bundle import Manifest, write_manifest

VOCAB = 17
QUICK = BenchOptions(prompt_tokens=8, output_tokens=5, rounds=3, warmup=1, num_samples=3, seq_len=6, threads=1)


def make_table(seed: int, vocab: int = VOCAB) -> np.ndarray:
    """Return the logits of a bigram model, float32 [vocab, vocab]."""
    return np.random.default_rng(seed).normal(0, 2, (vocab, vocab)).astype(np.float32)


def make_bundle(folder: Path, name: str, task: str = "text-generation", context: int = 64) -> Path:
    """Write a bundle whose graph nobody opens."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "model.onnx").write_bytes(b"graph")
    write_tokenizer(path)
    write_manifest(
        path,
        Manifest(
            task,
            architecture={"vocab_size": VOCAB, "context_length": context, "labels": ["bad", "good"]},
            graphs={"model": {"file": "model.onnx"}},
            bits_per_weight=4.5,
        ),
    )
    return path


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer whose words are w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(path / "tokenizer.json"))


def write_text(path: Path, count: int = 40, seed: int = 5) -> np.ndarray:
    """Write random words and return their ids."""
    ids = np.random.default_rng(seed).integers(VOCAB, size=count)
    path.write_text(" ".join(f"w{index}" for index in ids))
    return ids


def reference_figures(base: np.ndarray, ours: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Return the quality of one bigram model against another by the plain formulas, in float64."""
    base, ours = base.astype(np.float64), ours.astype(np.float64)
    p = np.exp(base) / np.exp(base).sum(axis=1, keepdims=True)
    q = np.exp(ours) / np.exp(ours).sum(axis=1, keepdims=True)
    before = np.concatenate([window[:-1] for window in ids])
    after = np.concatenate([window[1:] for window in ids])
    perplexity = np.exp(-np.log(q[before, after]).mean())
    return {
        "kld": (p * np.log(p / q)).sum(axis=1)[before].mean(),
        "top1_agreement": (p.argmax(axis=1) == q.argmax(axis=1))[before].mean(),
        "perplexity": perplexity,
        "perplexity_ratio": perplexity / np.exp(-np.log(p[before, after]).mean()),
    }
