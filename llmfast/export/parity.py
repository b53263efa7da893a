"""Proof that an exported decoder computes what PyTorch does, with the real weights.

PyTorch and ONNX Runtime run one after the other, each in a process of its own: neither's memory is
held while the other loads its model, and the bundle is seen to run where PyTorch was never imported.
Both leave the weights in memory-mapped files, and give back what they have used of them, so that no model is too
large to be compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import Manifest, ModelBundle
from llmfast.errors import GateError
from llmfast.graph.feeds import sequence_feeds
from llmfast.infer.engine import Engine
from llmfast.residency import bounded_residency
from llmfast.worker import Worker

# Float32 kernels that sum in another order differ by this much on real models; a wrong graph by far more.
ABSOLUTE_TOLERANCE = 1e-3
RELATIVE_TOLERANCE = 1e-3
# Two logits closer than this are a tie, which rounding may decide either way.
_TIE = 1e-4
_LONG, _SHORT = 256, 33  # tokens of the two prompts; a batch is made of the short one and as much of the long one
_BEGINNINGS = (1, 7)  # tokens of the long prompt that are also prompts of their own
_DECODED = 32  # tokens of the long prompt that are also fed one by one
_ROWS = 32  # positions compared at a time


def prove_decoder(
    source: str, folder: Path, manifest: Manifest, threads: int | None, advance: Callable[[], None]
) -> dict[str, Any]:
    """Compare logits at every position: whole prompts, batches, and token by token over the cache.

    Args:
        source: the checkpoint, as `open_checkpoint` takes it.
        folder: the bundle being written.
        manifest: its facts.
        threads: threads of ONNX Runtime.
        advance: called when PyTorch is done, and when ONNX Runtime is.

    Returns:
        `max_abs_diff`, `max_abs_logit`, `argmax_agreement`, `positions`, `prompt_tokens`, `decoded_tokens`.

    Raises:
        GateError: a difference over the tolerance, or another most likely token.
    """
    vocab_size, context = manifest.architecture["vocab_size"], manifest.architecture["context_length"]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, min(length, context)) for length in (_LONG, _SHORT)]
    with Worker("llmfast.export.parity:Reference", source, manifest.architecture.get("rotary_factors")) as reference:
        expected = reference.call("logits", prompts)
    advance()
    with Worker("llmfast.export.parity:Exported", folder, manifest, threads) as exported:
        measured: dict[str, Any] = exported.call("compare", prompts, expected)
    advance()
    return measured


class Reference:
    """The PyTorch model of a checkpoint, in the process that compares."""

    def __init__(self, source: str, rotary_factors: str | None) -> None:
        from llmfast.export.checkpoint import open_checkpoint
        from llmfast.export.rotary import use_long_factors

        checkpoint = open_checkpoint(source)
        if rotary_factors == "long":
            use_long_factors(checkpoint.config)
        self.model = checkpoint.load_reference()
        self._path = checkpoint.path

    def logits(self, prompts: list[np.ndarray]) -> list[np.ndarray]:
        """Return float32 [length, vocab] for each prompt, int64 [length]."""
        import torch

        with torch.inference_mode(), bounded_residency(self._path):
            return [self.model(torch.from_numpy(prompt[None]), use_cache=False).logits[0].numpy() for prompt in prompts]


class Exported:
    """The ONNX model that was written."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None) -> None:
        bundle = ModelBundle(folder, manifest, folder / manifest.graphs["model"]["file"])
        # Without prepacking the weights stay in the file, however large the model.
        self.engine = Engine(bundle, threads=threads, max_length=_LONG, prepack=False)
        self._folder = folder

    def compare(self, prompts: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, Any]:
        """Compare with PyTorch's logits of the long and the short prompt, and of their beginnings.

        A causal model's logits for a beginning are those it has inside the whole.

        Raises:
            GateError: a difference over the tolerance, or another most likely token.
        """
        with bounded_residency(self._folder):
            return self._compare(prompts, expected)

    def _compare(self, prompts: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, Any]:
        total = Difference()
        (whole, short), (logits, short_logits) = prompts, expected
        for length in sorted({min(length, len(whole)) for length in (*_BEGINNINGS, _LONG)}):
            total.add(f"prompt of {length}", self.engine.score(whole[:length]), logits[:length])
        batch = np.stack([whole[: len(short)], short])
        total.add("batch of 2", self._score_batch(batch), np.stack([logits[: len(short)], short_logits]))
        first = max(1, len(whole) - _DECODED)
        for position, row in self._decode(whole, first):
            total.add("token by token", row[None], logits[position : position + 1])
        return total.verdict() | {"prompt_tokens": len(whole), "decoded_tokens": len(whole) - first}

    def _score_batch(self, prompts: np.ndarray) -> np.ndarray:
        session = self.engine.session
        logits: np.ndarray = session.run(["logits"], sequence_feeds(session.get_inputs(), prompts))[0]
        return logits

    def _decode(self, prompt: np.ndarray, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Feed the end of a prompt token by token, over the cache that its beginning left."""
        self.engine.reset()
        yield first - 1, self.engine.prefill(prompt[:first])
        for position in range(first, len(prompt)):
            yield position, self.engine.decode(int(prompt[position]))


@dataclass
class Difference:
    """What the comparison has seen so far."""

    max_abs_diff: float = 0.0
    max_abs_logit: float = 0.0
    positions: int = 0
    decided: int = 0  # positions without a tie
    agreed: int = 0

    def add(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        """Compare logits of some positions, float32 [..., vocab]."""
        rows, reference = (array.reshape(-1, array.shape[-1]) for array in (actual, expected))
        for start in range(0, len(rows), _ROWS):
            self._add_rows(name, rows[start : start + _ROWS], reference[start : start + _ROWS])

    def _add_rows(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        difference = np.abs(actual - expected)
        if not np.all(difference <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(expected)):
            raise GateError(
                f"export differs from PyTorch: {name}: logits are off by up to {np.nanmax(difference):.3g}, "
                f"allowed {ABSOLUTE_TOLERANCE:g} + {RELATIVE_TOLERANCE:g} of the value",
                "nothing was written; please report the model's config.json",
            )
        top = np.partition(expected, -2, axis=-1)[:, -2:]
        clear = np.abs(top[:, 1] - top[:, 0]) > _TIE
        self.agreed += int((clear & (actual.argmax(-1) == expected.argmax(-1))).sum())
        self.decided += int(clear.sum())
        self.positions += clear.size
        self.max_abs_diff = max(self.max_abs_diff, float(difference.max()))
        self.max_abs_logit = max(self.max_abs_logit, float(np.abs(expected).max()))

    def verdict(self) -> dict[str, Any]:
        """Return the figures.

        Raises:
            GateError: another most likely token somewhere.
        """
        if self.agreed != self.decided:
            raise GateError(
                f"export differs from PyTorch: another most likely token at {self.decided - self.agreed} of "
                f"{self.decided} positions",
                "nothing was written; please report the model's config.json",
            )
        return {
            "max_abs_diff": self.max_abs_diff,
            "max_abs_logit": self.max_abs_logit,
            "argmax_agreement": self.agreed / max(1, self.decided),
            "positions": self.positions,
        }
