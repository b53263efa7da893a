"""How long a model goes on as the baseline does: greedy answers to the same prompts, token by token.

first_divergent_token = mean index of the first token that differs, the number of tokens where none does;
same_answers = share of prompts without a difference. The prompts are beginnings of the data's windows.
O(prompts * tokens) steps of decode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject
from llmfast.bench.workload import SEQ_LEN
from llmfast.bundle import ModelBundle
from llmfast.report import Column

ORDER = 65
KIND = "quality"
TASKS = ("text-generation",)
NEEDS = ("tokenizer",)
UNIT = "prompts"
DATA = "the same text, for how long greedy answers stay the same"
HIGHER_IS_BETTER = {"first_divergent_token": True, "same_answers": True}
COMPARED: tuple[str, ...] = ()
COLUMNS = (Column("same tokens", "first_divergent_token", lambda value: f"{value:.1f}"),)

# Enough to tell candidates apart: decoding is the slow part of a benchmark.
_PROMPTS = 4
_PROMPT_TOKENS = 64
_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from, int64 [n], how many to write, and whether they are the baseline's tokens."""

    ids: np.ndarray
    answer_tokens: int
    is_comparable: bool = True


def prepare(bundle: ModelBundle, data: Path, options: BenchOptions) -> list[Prompt]:
    """Take the beginnings of the data's windows."""
    from llmfast.text import leading_windows
    from llmfast.tokenizer import Tokenizer

    seq_len = options.seq_len or SEQ_LEN
    count = min(_PROMPTS, options.num_samples)
    windows = leading_windows(data, Tokenizer.load(bundle.path), count, seq_len, 1, may_be_fewer=True)
    length = min(_PROMPT_TOKENS, seq_len // 2)
    return [Prompt(ids[:length], min(_ANSWER_TOKENS, seq_len - length)) for ids, _ in windows]


def retokenize(bundle: ModelBundle, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return prompts that are not answered: other tokens can't be compared."""
    return [Prompt(prompt.ids[:0], 0, is_comparable=False) for prompt in prompts]


def answer(subject: Subject, prompt: Prompt) -> np.ndarray:
    """Return the greedy answer, int64 [answer_tokens]."""
    if not prompt.is_comparable:
        return np.zeros(0, np.int64)
    subject.engine.reset()
    tokens = [int(subject.engine.prefill(prompt.ids).argmax())]
    while len(tokens) < prompt.answer_tokens:
        tokens.append(int(subject.engine.decode(tokens[-1]).argmax()))
    return np.array(tokens, np.int64)


def compare(prompt: Prompt, tokens: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return one row, float64 [1, 2] = tokens before the first difference, whether there is none."""
    if not prompt.is_comparable:
        return np.full((1, 2), np.nan)
    same = np.cumprod(tokens == reference).sum()
    return np.array([[same, same == len(tokens)]], np.float64)


def figures(rows: np.ndarray) -> dict[str, float | None]:
    """Return the figures of some prompts from their rows, float64 [prompts, 2]."""
    same, is_whole = rows.mean(axis=0)
    return {"first_divergent_token": float(same), "same_answers": float(is_whole)}
