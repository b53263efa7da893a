"""How far the outputs of a graph moved from another's, sample by sample.

What is compared follows from the outputs: next-token predictions of decoders (kld, top1_agreement,
perplexity_ratio), labels (flipped_labels, kld), vectors (cosine), and for any other graph, or logits that are scores
and choose nothing, relative_error = |y - y'| / |y| over all its float outputs. Without float outputs there is nothing
to compare.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmfast.divergence import cosines, kl_divergence, log_softmax, prediction_figures, prediction_sums
from llmfast.errors import UnsupportedError

_VECTORS = ("sentence_embedding", "last_hidden_state")

# What kind of classifier a manifest's `problem_type` says: of which each label holds or not, and which has no labels.
_MULTI_LABEL, _REGRESSION = "multi_label_classification", "regression"

Values = dict[str, np.ndarray]


def choices_of(logits: np.ndarray, problem_type: str) -> np.ndarray | None:
    """Return logits [..., choices] whose softmax says how likely each choice is; None where they are scores.

    Each label of a multi-label classifier is a choice of its own: sigmoid(x) is the softmax of x and 0.

    Args:
        logits: a graph's, float [..., labels].
        problem_type: the manifest's; empty where one of the labels holds.
    """
    if logits.shape[-1] == 1 or problem_type == _REGRESSION:
        return None
    return np.stack([logits, np.zeros_like(logits)], -1) if problem_type == _MULTI_LABEL else logits


class Comparison:
    """Collects how far outputs moved, one sample after the other.

    Args:
        outputs: the graph's, those of its cache among them.
        predicts_tokens: its logits are those of the next tokens.
        problem_type: what kind of classifier it is, as of `choices_of`.

    Attributes:
        outputs: the ones that are compared.
    """

    def __init__(self, outputs: Sequence[str], predicts_tokens: bool, problem_type: str = "") -> None:
        vector = next((name for name in _VECTORS if name in outputs), None)
        self.outputs = [name for name in outputs if not name.startswith("present")]
        self._predicts_tokens = predicts_tokens
        self._problem_type = problem_type
        self._compare: Callable[[Values, list[np.ndarray], list[np.ndarray]], Mapping[str, float]] = self._errors
        if "logits" in outputs:
            self.outputs, self._compare = ["logits"], self._labels
        elif vector:
            self.outputs, self._compare = [vector], self._vectors
        self._rows: list[np.ndarray] = []
        self._samples: list[Mapping[str, float]] = []

    def add(self, values: Values, ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
        """Compare the outputs of one sample.

        Args:
            values: its inputs.
            ours: the quantized graph's `outputs`.
            theirs: the float graph's.
        """
        if self._predicts_tokens and self.outputs == ["logits"]:
            self._rows.append(prediction_sums(values["input_ids"][0], ours[0][0], theirs[0][0]))
        else:
            self._samples.append(self._compare(values, ours, theirs))

    def figures(self) -> dict[str, float]:
        """Return the figures over all samples; none where nothing can be compared."""
        if self._rows:
            figures = prediction_figures(np.concatenate(self._rows))
            return {key: float(value) for key, value in figures.items() if value is not None and key != "perplexity"}
        return {key: float(np.mean([one[key] for one in self._samples])) for key in self._samples[0]}

    def perplexities(self) -> dict[str, float]:
        """Return `perplexity` and `baseline_perplexity` of a decoder, nothing of anything else."""
        if not self._rows:
            return {}
        figures = prediction_figures(np.concatenate(self._rows))
        after, ratio = figures["perplexity"], figures["perplexity_ratio"]
        assert after is not None
        assert ratio is not None
        return {"perplexity": float(after), "baseline_perplexity": float(after / ratio)}

    def _labels(self, values: Values, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Mapping[str, float]:
        chosen, expected = (choices_of(one[0], self._problem_type) for one in (ours, theirs))
        if chosen is None or expected is None:
            return self._errors(values, ours, theirs)
        moved = kl_divergence(log_softmax(chosen), log_softmax(expected)).mean()
        flipped = (chosen.argmax(-1) != expected.argmax(-1)).mean()
        return {"kld": float(moved), "flipped_labels": float(flipped)}

    @staticmethod
    def _vectors(values: Values, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Mapping[str, float]:
        means = [one[0] if one[0].ndim == 2 else one[0].mean(1) for one in (ours, theirs)]
        return {"cosine": float(cosines(*means).mean())}

    @staticmethod
    def _errors(values: Values, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Mapping[str, float]:
        pairs = [
            (one.astype(np.float64), other.astype(np.float64))
            for one, other in zip(ours, theirs, strict=True)
            if other.dtype.kind == "f"
        ]
        if not pairs:
            return {}
        moved = sum(float(np.square(one - other).sum()) for one, other in pairs)
        power = sum(float(np.square(other).sum()) for _, other in pairs)
        return {"relative_error": float(np.sqrt(moved / max(power, 1e-30)))}


def damage_of(figures: Mapping[str, float]) -> tuple[str, float]:
    """Return the one figure that budgets are about, and its name: kld, else 1 - cosine, else relative error squared.

    Raises:
        UnsupportedError: nothing was measured.
    """
    if "kld" in figures:
        return "kld", figures["kld"]
    if "cosine" in figures:
        return "1 - cosine", 1 - figures["cosine"]
    if "relative_error" in figures:
        return "relative error squared", figures["relative_error"] ** 2
    raise UnsupportedError("the answers of this model can't be compared", "choose a --scheme in place of a budget")
