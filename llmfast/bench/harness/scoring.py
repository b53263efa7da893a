"""What lm-eval asks of a model, answered in the bundle's process.

Requests that follow each other often begin alike: the choices of one question, the questions behind one set of
examples. What the cache holds of such a beginning is not computed again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmfast.errors import UnsupportedError
from llmfast.infer.decoder import Decoder
from llmfast.infer.generate import finish, generate
from llmfast.infer.sampling import SAMPLING_OPTIONS, Sampling
from llmfast.tokenizer import Tokenizer

# Tokens before a continuation, and the continuation's.
Pair = tuple[Sequence[int], Sequence[int]]

# What lm-eval's generation settings may say beside those of `Sampling`, and how it then has to be.
_INERT: dict[str, tuple[Any, ...]] = {
    "do_sample": (True, False),
    "num_beams": (1,),
    "use_cache": (True,),
    "num_return_sequences": (1,),
}


def continuation_scores(engine: Decoder, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Return log p(continuation | context) in nats, and whether greedy decoding would write it.

    As lm-eval's own model for transformers does: the last token is scored and not read; what is too long for the
    context loses its beginning. Sums are float64.
    """
    scores = []
    held: list[int] = []
    engine.reset()
    for context, continuation in pairs:
        ids = [*context, *continuation][-(engine.capacity + 1) : -1]
        count = min(len(continuation), len(ids))
        shared = _common(held, ids[: len(ids) - count])
        engine.rollback(shared)
        logits = engine.score_last(np.array(ids[shared:], np.int64), count).astype(np.float64)
        held = ids
        wanted = np.array(continuation[-count:], np.int64)
        highest = logits.max(axis=1)
        norms = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
        is_greedy = bool((logits.argmax(axis=1) == wanted).all())
        scores.append((float((logits[np.arange(count), wanted] - norms).sum()), is_greedy))
    return scores


def continuations(engine: Decoder, tokenizer: Tokenizer, prompts: Sequence[tuple[Sequence[int], Any]]) -> list[str]:
    """Return what the model writes after each prompt: (tokens, lm-eval's normalized generation settings).

    Raises:
        UnsupportedError: a setting that llmfast does not have.
    """
    answers = []
    for ids, settings in prompts:
        sampling, stop, max_tokens = read_settings(settings)
        engine.reset()
        prompt = np.array(ids, np.int64)
        answers.append(finish(generate(engine, tokenizer, prompt, max_tokens, sampling, stop, tokenizer.eos_ids)).text)
    return answers


def read_settings(settings: dict[str, Any]) -> tuple[Sampling, tuple[str, ...], int]:
    """Return sampling, stop strings and the most tokens of lm-eval's generation settings.

    Raises:
        UnsupportedError: a setting that llmfast does not have.
    """
    for name, value in settings.items():
        is_known = name in ("until", "max_gen_toks", *SAMPLING_OPTIONS)
        if not is_known and value not in _INERT.get(name, ()):
            raise UnsupportedError(f"generation setting `{name}: {value}` of an lm-eval task", "leave the task out")
    chosen = {name: settings[name] for name in SAMPLING_OPTIONS if name in settings}
    if not settings.get("do_sample"):
        chosen["temperature"] = 0.0
    until = settings.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    return Sampling(**chosen), tuple(filter(None, stop)), settings["max_gen_toks"]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
