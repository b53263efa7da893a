"""What generation_config.json says of a search: beams, lengths, and tokens that are forced or forbidden.

Every field that changes the output is read or refused.
Source: https://huggingface.co/docs/transformers/main_classes/text_generation
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import read_json
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.report import note

# Tokens of an answer when neither the user nor the model says.
MAX_TOKENS = 256
# Fields that change the output in ways this search lacks, unless they have one of these values.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "sequence_bias": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "watermarking_config": (None,),
    "stop_strings": (None,),
}


@dataclass(frozen=True)
class Rules:
    """How a search goes. The names are those of transformers' GenerationConfig; lengths count the start token.

    Attributes:
        eos_token_ids: tokens that end a target.
        early_stopping: True ends with as many finished targets as beams; False when the best running one can't
            win at its length; "never" when it can't at any.
        length_penalty: power of the length that the scores of finished targets are divided by.
        forced_bos_token_id: the first token behind the start, the target language for instance.
        prompt_length: tokens that every target begins with, the start token among them.
    """

    decoder_start_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_length: int
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    min_length: int = 0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    renormalize_logits: bool = False
    remove_invalid_values: bool = False
    prompt_length: int = 1

    def apply(self, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the scores of the next tokens, those not allowed at -inf.

        Args:
            scores: float32 [rows, vocab]; not changed.
            ids: int64 [rows, length], the tokens so far.
        """
        if self._are_idle(ids.shape[1]):
            return scores
        scores = scores.copy()
        length = ids.shape[1]
        if self.repetition_penalty != 1.0:
            held = np.take_along_axis(scores, ids, 1)
            penalized = np.where(held < 0, held * self.repetition_penalty, held / self.repetition_penalty)
            np.put_along_axis(scores, ids, penalized.astype(np.float32), 1)
        if 0 < self.no_repeat_ngram_size <= length:
            self._forbid_repeats(scores, ids)
        for *prefix, last in self.bad_words_ids:
            if len(prefix) <= length:
                matches = (ids[:, length - len(prefix) :] == prefix).all(1)
                scores[matches, last] = -np.inf
        if length < self.min_length or length - self.prompt_length < self.min_new_tokens:
            scores[:, list(self.eos_token_ids)] = -np.inf
        if self.forced_bos_token_id is not None and length == 1:
            _force(scores, [self.forced_bos_token_id])
        if self.forced_eos_token_id and length == self.max_length - 1:
            _force(scores, list(self.forced_eos_token_id))
        if self.remove_invalid_values:
            limits = np.finfo(np.float32)
            np.nan_to_num(scores, copy=False, nan=0.0, posinf=float(limits.max), neginf=float(limits.min))
        scores[:, list(self.suppress_tokens)] = -np.inf
        if self.begin_suppress_tokens and length == self.prompt_length + (self.forced_bos_token_id is not None):
            scores[:, list(self.begin_suppress_tokens)] = -np.inf
        if self.renormalize_logits:
            scores = scores - scores.max(-1, keepdims=True)
            scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        return scores

    def _are_idle(self, length: int) -> bool:
        """Whether nothing is to be done at this length, as at most steps."""
        anywhere = self.no_repeat_ngram_size, self.bad_words_ids, self.suppress_tokens, self.renormalize_logits
        at_begin = self.forced_bos_token_id is not None or bool(self.begin_suppress_tokens)
        return not (
            any(anywhere)
            or self.remove_invalid_values
            or self.repetition_penalty != 1.0
            or (at_begin and length <= self.prompt_length + 1)
            or length < self.min_length
            or length - self.prompt_length < self.min_new_tokens
            or (self.forced_eos_token_id and length == self.max_length - 1)
        )

    def _forbid_repeats(self, scores: np.ndarray, ids: np.ndarray) -> None:
        size, length = self.no_repeat_ngram_size, ids.shape[1]
        windows = np.lib.stride_tricks.sliding_window_view(ids, size, axis=1)
        prefix = ids[:, length + 1 - size :]
        rows, places = np.nonzero((windows[:, :, :-1] == prefix[:, None]).all(-1))
        scores[rows, windows[rows, places, -1]] = -np.inf


def read_rules(
    folder: Path,
    context_length: int | None,
    max_tokens: int | None = None,
    prompt_length: int = 1,
    **overrides: Any,
) -> Rules:
    """Read the rules of a bundle.

    Args:
        folder: holds generation_config.json.
        context_length: positions of the decoder; None is any number.
        max_tokens: most tokens behind the prompt; None takes the model's limit.
        prompt_length: tokens that every target begins with, the start token among them.
        overrides: fields of GenerationConfig that take precedence over the file's; None leaves the file's.

    Raises:
        InputError: the file is malformed, or does not say how a target starts.
        UnsupportedError: it asks for something that this search lacks.
        OptionError: a value out of range.
    """
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise InputError(f"malformed settings: `{path}`: not a JSON object")
    settings |= {key: value for key, value in overrides.items() if value is not None}
    for key, harmless in _REFUSED.items():
        if settings.get(key) not in harmless:
            raise UnsupportedError(f"`{path}` sets {key} to {settings[key]}, which is not supported", "remove it")
    if settings.get("do_sample"):
        note(f"note: `{path}` asks for sampling; the likeliest text is searched instead")
    try:
        return _check(Rules(**_fields(settings, path, context_length, max_tokens, prompt_length)))
    except (TypeError, ValueError) as error:
        raise InputError(f"malformed settings: `{path}`: {error}") from error


def _fields(
    settings: Mapping[str, Any], path: Path, context_length: int | None, max_tokens: int | None, prompt_length: int
) -> dict[str, Any]:
    start = settings.get("decoder_start_token_id", settings.get("bos_token_id"))
    eos = _tuple(settings.get("eos_token_id"))
    if type(start) is not int:
        raise InputError(f"`{path}` has no decoder_start_token_id", "export the model again, or add it")
    pad = settings.get("pad_token_id")
    if max_tokens is None:
        max_tokens = settings.get("max_new_tokens")
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"--max-tokens {max_tokens}: must be at least 1")
    max_length = settings.get("max_length") or MAX_TOKENS + prompt_length
    if max_tokens is not None:
        max_length = max_tokens + prompt_length
    if context_length is not None:
        max_length = min(max_length, context_length)
    known = {field.name for field in fields(Rules)}
    found = {key: value for key, value in settings.items() if key in known and value is not None}
    if "min_new_tokens" in found:
        found["min_length"] = 0  # as for transformers, the one replaces the other
    return found | {
        "decoder_start_token_id": start,
        "eos_token_ids": eos,
        "pad_token_id": pad if pad is not None else next(iter(eos), 0),
        "max_length": max_length,
        "prompt_length": prompt_length,
        "forced_eos_token_id": _tuple(settings.get("forced_eos_token_id")),
        # A bad word that is an end token is none: every target must be able to end.
        "bad_words_ids": tuple(
            tuple(word) for word in settings.get("bad_words_ids") or () if not (len(word) == 1 and word[0] in eos)
        ),
        "suppress_tokens": _tuple(settings.get("suppress_tokens")),
        "begin_suppress_tokens": _tuple(settings.get("begin_suppress_tokens")),
    }


def _check(rules: Rules) -> Rules:
    if rules.num_beams < 1:
        raise OptionError(f"--num-beams {rules.num_beams}: must be at least 1")
    if rules.max_length <= rules.prompt_length:
        raise OptionError(f"a target of {rules.max_length} tokens has no room for an answer")
    if rules.no_repeat_ngram_size < 0:
        raise OptionError(f"--no-repeat-ngram-size {rules.no_repeat_ngram_size}: must be 0 (off) or more")
    return rules


def _tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _force(scores: np.ndarray, tokens: list[int]) -> None:
    scores[:] = -np.inf
    scores[:, tokens] = 0
