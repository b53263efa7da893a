"""Proof that an exported decoder computes what PyTorch does, with the real weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import Manifest, ModelBundle
from llmfast.errors import GateError
from llmfast.export.checkpoint import Checkpoint
from llmfast.infer.engine import Engine

# Float32 kernels that sum in another order differ by this much on real models; a wrong graph by far more.
ABSOLUTE_TOLERANCE = 1e-3
RELATIVE_TOLERANCE = 1e-3
# Two logits closer than this are a tie, which rounding may decide either way.
_TIE = 1e-4
_PROMPTS = ((1, 1), (1, 7), (1, 256), (2, 33))  # batch, length
_DECODED = 32  # positions of the longest prompt that are also fed one by one


def prove_decoder(
    checkpoint: Checkpoint, folder: Path, manifest: Manifest, threads: int | None, advance: Callable[[], None]
) -> dict[str, Any]:
    """Compare logits at every position: whole prompts, chunks, and token by token.

    Returns:
        `max_abs_diff`, `max_abs_logit`, `argmax_agreement`, `positions`, `prompts`.

    Raises:
        GateError: a difference over the tolerance, or another most likely token.
    """
    rng = np.random.default_rng(0)
    vocab_size, context = manifest.architecture["vocab_size"], manifest.architecture["context_length"]
    shapes = [(batch, min(length, context)) for batch, length in _PROMPTS]
    prompts = [rng.integers(0, vocab_size, shape) for shape in shapes]
    expected = _reference_logits(checkpoint, prompts)
    advance()
    engine = Engine(ModelBundle(folder, manifest, folder / manifest.graphs["model"]["file"]), threads=threads)
    pairs = []
    for prompt, logits in zip(prompts, expected, strict=True):
        if len(prompt) == 1:
            pairs.append((f"prompt of {prompt.size}", engine.score(prompt[0]), logits[0]))
        else:
            pairs.append((f"batch of {len(prompt)}", _score_batch(engine, prompt), logits))
    longest = max(range(len(prompts)), key=lambda index: prompts[index].shape[1])
    pairs.append(_decode(engine, prompts[longest][0], expected[longest][0]))
    advance()
    return _compare(pairs) | {"prompts": [list(shape) for shape in shapes]}


def _reference_logits(checkpoint: Checkpoint, prompts: list[np.ndarray]) -> list[np.ndarray]:
    """Run PyTorch and let go of its model before ONNX Runtime loads its own."""
    import torch

    model = checkpoint.load_reference()
    with torch.inference_mode():
        return [model(torch.from_numpy(prompt), use_cache=False).logits.numpy() for prompt in prompts]


def _score_batch(engine: Engine, prompts: np.ndarray) -> np.ndarray:
    batch, length = prompts.shape
    feeds = {
        "input_ids": prompts,
        "seqlens_k": np.full(batch, length - 1, np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "num_logits": np.array([length], np.int64),
    }
    for value in engine.session.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
    logits: np.ndarray = engine.session.run(["logits"], feeds)[0]
    return logits


def _decode(engine: Engine, prompt: np.ndarray, expected: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """Feed the end of a prompt token by token, over the cache that its beginning left."""
    begin = max(1, len(prompt) - _DECODED)
    engine.reset()
    rows = [engine.prefill(prompt[:begin]).copy()]
    rows += [engine.decode(int(token)).copy() for token in prompt[begin:]]
    return "token by token", np.stack(rows), expected[begin - 1 :]


def _compare(pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    worst, scale, agreed, decided, positions = 0.0, 0.0, 0, 0, 0
    for name, actual, expected in pairs:
        difference = np.abs(actual - expected)
        if not np.all(difference <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(expected)):
            raise GateError(
                f"export differs from PyTorch: {name}: logits are off by up to {np.nanmax(difference):.3g}, "
                f"allowed {ABSOLUTE_TOLERANCE:g} + {RELATIVE_TOLERANCE:g} of the value",
                "nothing was written; please report the model's config.json",
            )
        top = np.partition(expected, -2, axis=-1)[..., -2:]
        clear = np.abs(top[..., 1] - top[..., 0]) > _TIE
        agreed += int((clear & (actual.argmax(-1) == expected.argmax(-1))).sum())
        decided += int(clear.sum())
        positions += clear.size
        worst, scale = max(worst, float(difference.max())), max(scale, float(np.abs(expected).max()))
    if agreed != decided:
        raise GateError(
            f"export differs from PyTorch: another most likely token at {decided - agreed} of {decided} positions",
            "nothing was written; please report the model's config.json",
        )
    return {
        "max_abs_diff": worst,
        "max_abs_logit": scale,
        "argmax_agreement": agreed / max(1, decided),
        "positions": positions,
    }
