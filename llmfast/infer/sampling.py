"""Choosing the next token from a model's logits."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from llmfast.errors import InputError, OptionError

# Seeds that are shorter, as all that people choose, give no two texts of any two runs the same random numbers.
_SEED_BITS = 64


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The filters work in this order: temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token (greedy).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: make tokens that occurred less likely (> 1) or more likely (< 1).
        seed: of the random numbers; the same seed gives the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if rule := broken_rule(name, value):
                raise OptionError(f"--{name.replace('_', '-')} {value}: {rule}")

    def of_text(self, number: int) -> "Sampling":
        """Return the sampling of one of several texts, each with random numbers of its own.

        Args:
            number: of the text, from 1; the first has the seed as it is.
        """
        return replace(self, seed=self.seed + ((number - 1) << _SEED_BITS))


SAMPLING_OPTIONS = tuple(field.name for field in fields(Sampling))
_RULES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < math.inf, "must be 0 or more"),
    "top_k": (lambda value: value >= 0, "must be 0 (off) or more"),
    "top_p": (lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "must be between 0 and 1"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "must be above 0"),
    "seed": (lambda value: value >= 0, "must be 0 or more"),
}


def broken_rule(name: str, value: float) -> str | None:
    """Return what a field of `Sampling` must be and this value is not, None for a value that it may have."""
    is_met, rule = _RULES[name]
    return None if is_met(value) else rule


def sample(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator, previous: Collection[int] = ()) -> int:
    """Choose a token.

    Args:
        logits: float32 [vocab]; not changed.
        sampling: temperature and filters.
        rng: used once per call unless the choice is greedy.
        previous: distinct tokens that the repetition penalty applies to.

    Raises:
        InputError: no logit is finite, or one is NaN.
    """
    if sampling.repetition_penalty != 1.0 and previous:
        logits = _penalize(logits, np.fromiter(previous, np.int64, len(previous)), sampling.repetition_penalty)
    best = int(np.argmax(logits))
    if not math.isfinite(logits[best]):
        raise InputError("the model's logits are not finite", "its weights hold NaN or infinity, or overflow")
    if sampling.temperature == 0 or sampling.top_k == 1:
        return best
    tokens, probabilities = candidates(logits, sampling)
    sums = np.cumsum(probabilities)
    drawn = np.searchsorted(sums, rng.random() * sums[-1], side="right")
    return int(tokens[min(drawn, len(tokens) - 1)])


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens the filters keep, and their probabilities before the filters' removals.

    Tokens that tie with the k-th are all kept; top-p keeps the lower ids of a tie.

    Source: `TopKLogitsWarper`, `TopPLogitsWarper` and `MinPLogitsWarper` of transformers.
    """
    tokens = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        tokens = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
    scores = logits[tokens].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf
        weights = np.exp((scores - scores.max()) / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        kept = _nucleus(probabilities, sampling.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    # All tokens below this together weigh less than 1 - top_p: they are outside without sorting them.
    heavy = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    order = heavy[np.argsort(-probabilities[heavy], kind="stable")]
    likelier = np.cumsum(probabilities[order]) - probabilities[order]
    inside: np.ndarray = order[likelier < top_p]
    return inside


def _penalize(logits: np.ndarray, previous: np.ndarray, penalty: float) -> np.ndarray:
    logits = logits.copy()
    held = logits[previous]
    logits[previous] = np.where(held < 0, held * penalty, held / penalty)
    return logits
