"""How far a pruned checkpoint's answers moved from the original's, in PyTorch, on text it was not calibrated on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmfast import registry
from llmfast.bundle import TEXT_GENERATION, ModelBundle
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.encoder import load_encoder
from llmfast.export.pooling import Pooling, read_output, read_pooling
from llmfast.prune.checkpoint.workpiece import run_model
from llmfast.prune.options import PruneOptions
from llmfast.quantize.comparison import Comparison
from llmfast.quantize.corpus import Corpus
from llmfast.quantize.measure import SEQ_LEN, ProofText
from llmfast.report import note, progress


def choose_text(bundle: ModelBundle, options: PruneOptions) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return the samples to compare on, int64 [seq] each, and what the lineage says of their text."""
    calibration = options.calibration
    data = Corpus(options.data, calibration.field) if options.data else None
    text = ProofText(data, calibration, True, options.data_samples)
    corpus, samples = text.choose(lambda one, seq_len: one.samples(bundle, seq_len))
    return samples, {**corpus.describe(), "num_samples": len(samples)}


class Proof:
    """The comparison with the original, which is opened again from its files.

    Args:
        checkpoint: the original.
        task: what it is for.
        samples: token ids, int64 [seq] each; the first 256 of each are compared.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint, task: str, samples: Sequence[np.ndarray]) -> None:
        self._checkpoint = checkpoint
        self._task = task
        self._samples = [sample[:SEQ_LEN] for sample in samples]

    def compare(self, model: Any) -> dict[str, float]:
        """Run both on the same samples, and return the figures; `perplexity` of both for a decoder."""
        original = self._load()
        outputs = registry.load("tasks", self._task).OUTPUTS
        if model.config.hidden_size != original.config.hidden_size and "last_hidden_state" in outputs:
            note(
                "note: vectors of another size are not compared; `llmfast bench --data PAIRS` says what they are worth"
            )
            return {}
        pooling = read_pooling(self._checkpoint.path) if "sentence_embedding" in outputs else None
        problem_type = self._checkpoint.config.problem_type or ""
        comparison = Comparison(outputs, self._task == TEXT_GENERATION, problem_type)
        with progress("comparing with the original", len(self._samples)) as advance:
            for sample in self._samples:
                ours, theirs = (_outputs(one, sample, comparison.outputs, pooling) for one in (model, original))
                comparison.add({"input_ids": sample[None]}, ours, theirs)
                advance()
        return comparison.figures() | comparison.perplexities()

    def _load(self) -> Any:
        if self._task == TEXT_GENERATION:
            return self._checkpoint.load_reference()
        auto_model = registry.load("tasks", self._task).AUTO_MODEL
        return load_encoder(self._checkpoint.path, self._checkpoint.config, auto_model)


def _outputs(model: Any, sample: np.ndarray, names: list[str], pooling: Pooling | None) -> list[np.ndarray]:
    import torch

    result = run_model(model, sample)
    mask = torch.ones(1, len(sample), dtype=torch.int64)
    return [read_output(result, name, mask, pooling).float().numpy() for name in names]
