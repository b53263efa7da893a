"""A recording gets a label: the word that is said, the language, the mood, who speaks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.runtime import open_session
from llmfast.tasks._encoder import run_session
from llmfast.tasks._labels import check_top_k, rank_labels, spell_labels
from llmfast.tasks._recordings import read_recording, run_recordings

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModelForAudioClassification"
OUTPUTS = ("logits",)
INPUT = "input_values"
INFER_OPTIONS = ("top_k",)
TEXT_OPTION = "audio"


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None, top_k: int = 5
) -> list[dict[str, Any]]:
    """Classify each recording.

    Args:
        bundle: the model; its preprocessor_config.json says how sound becomes its input.
        texts: paths of WAV files, 16-bit PCM at the model's sampling rate.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        top_k: how many labels, at most.

    Returns:
        `audio` (the path), `label`, `score` (the label's) and `labels` of each recording, in their order: the
        likeliest labels, best first, each `label` and `score`.

    Raises:
        OptionError: top_k below 1.
        InputError: a file that is missing, of another sampling rate, too short, or with samples that are not 16 bits
            wide; or no preprocessor_config.json.
        UnsupportedError: the graph is none of this task.

    Source: `AudioClassificationPipeline` of transformers.
    """
    check_top_k(top_k)
    session = open_session(bundle.model, provider, threads)
    rows = run_recordings(bundle, texts, lambda values: classify(session, {INPUT: values}))
    return [{"audio": path} | rank_labels(row, bundle, top_k) for path, row in zip(texts, rows, strict=True)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line a label for people."""
    return spell_labels(answer)


def classify(session: "onnxruntime.InferenceSession", batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the logits of recordings, float32 [batch, samples] by the input's name: float32 [batch, classes]."""
    return run_session(session, OUTPUTS, batch)[0]


def read_input(bundle: ModelBundle, path: str) -> dict[str, np.ndarray]:
    """Return the graph's input for a WAV file, a batch of one."""
    return {INPUT: read_recording(bundle, path)[None]}
