"""Proof that an exported encoder-decoder computes what PyTorch does, with the real weights.

As for decoders, PyTorch and ONNX Runtime run one after the other, each in a process of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import Manifest, ModelBundle, read_json
from llmfast.errors import InputError
from llmfast.export.encoder_decoder import Spectrogram
from llmfast.export.parity import Difference
from llmfast.graph.feeds import FEATURES
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.worker import Worker

_BATCHES = (((1,), 1), ((5, 33, 17), 24), ((200,), 40))  # lengths of the sources, length of the targets
_BEAMS = 2  # rows of a source when the targets are fed token by token


@dataclass(frozen=True)
class Batch:
    """Sources of different lengths and a target for each.

    Attributes:
        source: the encoder's inputs; `input_ids` and `attention_mask`, int64 [batch, source], padded on the right,
            or `input_features`, float32 [batch, bands, frames].
        targets: int64 [batch, target].
    """

    source: dict[str, np.ndarray]
    targets: np.ndarray


def prove_encoder_decoder(
    source: Path,
    folder: Path,
    manifest: Manifest,
    vocab_sizes: tuple[int, int],
    spectrogram: Spectrogram | None,
    threads: int | None,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Compare logits at every position: whole targets over padded batches, and token by token over the cache.

    Args:
        source: the checkpoint's folder.
        folder: the bundle being written.
        manifest: its facts.
        vocab_sizes: tokens of sources and of targets.
        spectrogram: what sources are instead of tokens; None is tokens.
        threads: threads of ONNX Runtime.
        advance: called when PyTorch is done, and when ONNX Runtime is.

    Returns:
        `max_abs_diff`, `max_abs_logit`, `argmax_agreement`, `positions`, `batches`.

    Raises:
        GateError: a difference over the tolerance, or another most likely token.
    """
    context, pad = manifest.architecture["context_length"], manifest.architecture["pad_token_id"]
    batches = list(_batches(vocab_sizes, spectrogram, pad, context))
    with Worker("llmfast.export.seq2seq_parity:Reference", source) as reference:
        expected = reference.call("logits", batches)
    advance()
    with Worker("llmfast.export.seq2seq_parity:Exported", folder, manifest, threads) as exported:
        measured: dict[str, Any] = exported.call("compare", batches, expected)
    advance()
    shapes = [[list(next(iter(batch.source.values())).shape), list(batch.targets.shape)] for batch in batches]
    return measured | {"batches": shapes}


def _batches(
    vocab_sizes: tuple[int, int], spectrogram: Spectrogram | None, pad: int, context: int | None
) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    source_size, target_size = vocab_sizes
    for lengths, target in _BATCHES:
        cut = [length if context is None else min(length, context) for length in (*lengths, target)]
        if spectrogram is None:
            ids = _without(rng.integers(0, source_size, (len(lengths), max(cut[:-1]))), pad)
            mask = (np.arange(ids.shape[1]) < np.array(cut[:-1])[:, None]).astype(np.int64)
            source = {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask}
        else:
            shape = len(lengths), spectrogram.mel_bins, spectrogram.frames
            source = {FEATURES: rng.uniform(-1, 1, shape).astype(np.float32)}
        targets = _without(rng.integers(0, target_size, (len(lengths), cut[-1])), pad)
        yield Batch(source, targets)


def _without(ids: np.ndarray, pad: int) -> np.ndarray:
    """Replace padding within a text: some models count positions around it."""
    return np.where(ids == pad, pad - 1 if pad else 1, ids)


def load_reference(source: Path, dtype: str = "float32") -> Any:
    """Load an encoder-decoder as `transformers` does."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        hears = read_json(source / "config.json")["model_type"] == "whisper"
        factory = AutoModelForSpeechSeq2Seq if hears else AutoModelForSeq2SeqLM
        return factory.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation="eager", trust_remote_code=False
        ).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"PyTorch can't load `{source}`: {str(error).strip().splitlines()[0]}",
            "weights and config.json do not belong together",
        ) from error


class Reference:
    """The PyTorch model of a checkpoint, in the process that compares."""

    def __init__(self, source: Path) -> None:
        self.model = load_reference(source)

    def logits(self, batches: list[Batch]) -> list[np.ndarray]:
        """Return float32 [batch, target, vocab] for each batch."""
        import torch

        with torch.inference_mode():
            return [
                self.model(
                    **{name: torch.from_numpy(array) for name, array in batch.source.items()},
                    decoder_input_ids=torch.from_numpy(batch.targets),
                    use_cache=False,
                ).logits.numpy()
                for batch in batches
            ]


class Exported:
    """The ONNX model that was written."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None) -> None:
        bundle = ModelBundle(folder, manifest, folder / manifest.graphs["encoder"]["file"])
        self.engine = Seq2SeqEngine(bundle, threads=threads)

    def compare(self, batches: list[Batch], expected: list[np.ndarray]) -> dict[str, Any]:
        """Compare with PyTorch's logits, batch by batch.

        Raises:
            GateError: a difference over the tolerance, or another most likely token.
        """
        total = Difference()
        for batch, logits in zip(batches, expected, strict=True):
            if FEATURES in batch.source:
                self.engine.encode_features(batch.source[FEATURES])
            else:
                self.engine.encode(**batch.source)
            total.add(f"batch of {len(logits)}", self.engine.score(batch.targets), logits)
            for position, rows in enumerate(self._decode(batch.targets)):
                total.add("token by token", rows, logits.repeat(_BEAMS, 0)[:, position])
        return total.verdict()

    def _decode(self, targets: np.ndarray) -> Iterator[np.ndarray]:
        """Feed targets token by token, as several beams of each source that change places at every step."""
        engine = self.engine
        rows = targets.repeat(_BEAMS, 0)
        engine.start(*rows.shape)
        places = np.arange(len(rows)).reshape(-1, _BEAMS)[:, ::-1].reshape(-1)
        for position in range(rows.shape[1]):
            yield engine.decode(rows[:, position : position + 1])
            engine.reorder(places)
