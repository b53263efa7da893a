"""Statistics of the activations that linear layers multiply, from running the float model on a text.

Nothing of the text is kept: each sample is added to running sums, so memory depends on the widths of
the layers asked about and not on the number of samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.bundle import TEXT_GENERATION, ModelBundle, sha256
from llmfast.errors import InputError
from llmfast.graph.feeds import sequence_feeds
from llmfast.graph.model import OnnxModel
from llmfast.runtime import import_onnxruntime, open_session
from llmfast.text import read_lines, read_text, token_windows
from llmfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Calibration:
    """A text and how much of it is used.

    Attributes:
        path: UTF-8 text; for encoders one sample a line.
        num_samples: windows, or lines.
        seq_len: tokens per window; an encoder's lines are cut at it.
    """

    path: Path
    num_samples: int = 64
    seq_len: int = 512

    def describe(self) -> dict[str, Any]:
        """Return what the manifest's lineage holds."""
        return {
            "name": self.path.name,
            "sha256": sha256(self.path),
            "num_samples": self.num_samples,
            "seq_len": self.seq_len,
        }


@dataclass(frozen=True)
class Statistics:
    """What is known of activations `[tokens, K]`.

    Attributes:
        num_tokens: how many were seen.
        abs_max: float32 [K], the largest magnitude of each channel.
        gram: float32 [K, K], the mean of x x^T over tokens; None unless asked for.
    """

    num_tokens: int
    abs_max: np.ndarray
    gram: np.ndarray | None = None

    def multiplied(self, factors: np.ndarray) -> "Statistics":
        """Return the statistics of the activations times `factors`, float32 [K]."""
        gram = None if self.gram is None else self.gram * factors * factors[:, None]
        return replace(self, abs_max=self.abs_max * factors, gram=gram)


class Calibrator:
    """Runs a float model on the samples of a calibration text.

    Args:
        model: the graph.
        bundle: where its tokenizer is.
        calibration: the text.
        names: every value that `measure` may be asked about.

    Raises:
        InputError: no tokenizer, or too little text.
        UnsupportedError: an input of the graph that can't be made from token ids.
    """

    def __init__(self, model: OnnxModel, bundle: ModelBundle, calibration: Calibration, names: Sequence[str]) -> None:
        self.samples: list[np.ndarray] = _samples(bundle, calibration)
        self._session = _open_with_outputs(model, names)
        self._inputs = self._session.get_inputs()

    def measure(self, names: Sequence[str], gram: bool, advance: Callable[[], None]) -> dict[str, Statistics]:
        """Return the statistics of some values over all samples.

        Args:
            names: the values.
            gram: also collect the [K, K] matrices.
            advance: called once per sample.
        """
        options = import_onnxruntime().RunOptions()
        options.only_execute_path_to_fetches = True
        sums: dict[str, Statistics] = {}
        for ids in self.samples:
            values = self._session.run(list(names), sequence_feeds(self._inputs, ids[None]), options)
            for name, value in zip(names, values, strict=True):
                seen = _summarize(value.reshape(-1, value.shape[-1]), gram)
                sums[name] = _add(sums[name], seen) if name in sums else seen
            advance()
        return {name: _mean(total) for name, total in sums.items()}


def _summarize(rows: np.ndarray, gram: bool) -> Statistics:
    return Statistics(len(rows), np.abs(rows).max(0), rows.T @ rows if gram else None)


def _add(one: Statistics, other: Statistics) -> Statistics:
    if one.gram is not None and other.gram is not None:
        np.add(one.gram, other.gram, out=one.gram)  # in place: these matrices are the largest thing in memory
    return replace(one, num_tokens=one.num_tokens + other.num_tokens, abs_max=np.maximum(one.abs_max, other.abs_max))


def _mean(total: Statistics) -> Statistics:
    return replace(total, gram=None if total.gram is None else total.gram / np.float32(total.num_tokens))


def _samples(bundle: ModelBundle, calibration: Calibration) -> list[np.ndarray]:
    """Return token ids, int64 [seq] each."""
    tokenizer = Tokenizer.load(bundle.path)
    if bundle.manifest.task == TEXT_GENERATION:
        limit = bundle.manifest.architecture.get("context_length", calibration.seq_len)
        ids = tokenizer.encode(read_text(calibration.path))
        return list(token_windows(ids, calibration.num_samples, min(calibration.seq_len, limit)))
    length = min(bundle.longest_text(calibration.seq_len), calibration.seq_len)
    lines = read_lines(calibration.path)[: calibration.num_samples]
    if not lines:
        raise InputError(f"no line of text in `{calibration.path}`", "encoders are calibrated on one sample a line")
    return [np.array(tokenizer.encode(line)[:length], np.int64) for line in lines]


def _open_with_outputs(model: OnnxModel, names: Sequence[str]) -> Any:
    """Open the float graph with inner values as outputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    present = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in present
    )
    return open_session(model.path, graph=proto.SerializeToString())
