"""Greedy and beam search over an encoder-decoder, with the results of transformers' `generate`.

Source: `_sample` and `_beam_search` of
https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py
"""

from dataclasses import dataclass

import numpy as np

from llmfast.infer.rules import Rules
from llmfast.infer.seq2seq import Seq2SeqEngine

# What a beam that must not be chosen has as its score, as in transformers.
_NEVER = np.float32(-1e9)
_BLOCK = 256  # scores whose largest is taken before the best are looked for


@dataclass(frozen=True)
class Found:
    """The target found for one source.

    Attributes:
        ids: its tokens, without the start and end tokens.
        finish_reason: an end token, or the limit of tokens.
    """

    ids: list[int]
    finish_reason: str


def search(engine: Seq2SeqEngine, rules: Rules, prompts: np.ndarray | None = None) -> list[Found]:
    """Find a target for every source that the engine has encoded.

    Args:
        engine: its targets are overwritten.
        rules: which tokens are allowed, how many beams there are, and when to end.
        prompts: what each target begins with, int64 [batch, rules.prompt_length]; None is the start token.
    """
    if prompts is None:
        prompts = np.full((engine.num_sources, 1), rules.decoder_start_token_id)
    if rules.num_beams == 1:
        sequences = _greedy(engine, rules, prompts)
    else:
        sequences = _BeamSearch(engine, rules, prompts).run()
    return [_trim(sequence, rules) for sequence in sequences]


def _greedy(engine: Seq2SeqEngine, rules: Rules, prompts: np.ndarray) -> np.ndarray:
    """Return int64 [batch, length], -1 behind the end."""
    batch, length = prompts.shape
    engine.start(batch, rules.max_length)
    ids = np.full((batch, rules.max_length), -1, np.int64)
    ids[:, :length] = prompts
    unfinished = np.ones(batch, bool)
    while length < rules.max_length and unfinished.any():
        scores = rules.apply(engine.decode(ids[:, engine.length : length]), ids[:, :length])
        tokens = np.where(unfinished, scores.argmax(-1), rules.pad_token_id)
        ids[:, length] = tokens
        unfinished &= ~np.isin(tokens, rules.eos_token_ids)
        length += 1
    return ids


class _BeamSearch:
    """The state of one search. Arrays are [batch, beams] or [batch, beams, max_length]."""

    def __init__(self, engine: Seq2SeqEngine, rules: Rules, prompts: np.ndarray) -> None:
        self.engine = engine
        self.rules = rules
        self.batch, self.beams = engine.num_sources, rules.num_beams
        shape = (self.batch, self.beams)
        self.running = np.full((*shape, rules.max_length), -1, np.int64)
        self.running[:, :, : rules.prompt_length] = prompts[:, None]
        self.running_scores = np.zeros(shape, np.float32)
        self.running_scores[:, 1:] = _NEVER  # all beams are alike: only the first may go on
        self.finished = self.running.copy()
        self.finished_scores = np.full(shape, _NEVER, np.float32)
        self.is_finished = np.zeros(shape, bool)
        self.improvable = np.ones((self.batch, 1), bool)

    def run(self) -> np.ndarray:
        """Return the best sequence of each source, int64 [batch, max_length], -1 behind the end."""
        rules, rows = self.rules, self.batch * self.beams
        self.engine.start(rows, rules.max_length)
        length, is_open = rules.prompt_length, True
        while is_open:
            ids = self.running.reshape(rows, -1)
            scores = log_softmax(self.engine.decode(ids[:, self.engine.length : length]))
            is_open = self._advance(rules.apply(scores, ids[:, :length]), length)
            length += 1
        best: np.ndarray = self.finished[:, 0]
        return best

    def _advance(self, scores: np.ndarray, length: int) -> bool:
        """Choose the beams' next tokens by scores [rows, vocab]; return whether there is more to find."""
        rules, vocab_size = self.rules, scores.shape[-1]
        scores = scores.reshape(self.batch, self.beams, vocab_size) + self.running_scores[:, :, None]
        kept = max(2, 1 + len(rules.eos_token_ids)) * self.beams
        top_scores, top = _best(scores.reshape(self.batch, -1), kept)
        parents, tokens = top // vocab_size, top % vocab_size
        candidates = np.take_along_axis(self.running, parents[:, :, None], 1)
        candidates[:, :, length] = tokens
        ends = np.isin(tokens, rules.eos_token_ids) | (length + 1 >= rules.max_length)

        going_on = top_scores + ends * _NEVER
        self.running_scores, chosen = _best(going_on, self.beams)
        self.running = np.take_along_axis(candidates, chosen[:, :, None], 1)
        self._keep_finished(candidates, top_scores, ends, length)
        self._reorder(np.take_along_axis(parents, chosen, 1))
        self._check_improvable(length + 1)
        is_full = self.is_finished.all() and rules.early_stopping is True
        return bool(self.improvable.any() and not is_full and not ends.all())

    def _keep_finished(self, candidates: np.ndarray, scores: np.ndarray, ends: np.ndarray, length: int) -> None:
        """Merge the candidates that just ended with the best that ended before."""
        rules = self.rules
        ended = ends & (np.arange(scores.shape[1]) < self.beams)
        scores = scores / np.float32((length + 1 - rules.prompt_length) ** rules.length_penalty)
        if rules.early_stopping is True:
            scores = scores + self.is_finished.all(1, keepdims=True) * _NEVER
        scores = scores + ~self.improvable * _NEVER + ~ended * _NEVER
        merged = np.concatenate([self.finished_scores, scores], 1)
        self.finished_scores, chosen = _best(merged, self.beams)
        sequences = np.concatenate([self.finished, candidates], 1)
        self.finished = np.take_along_axis(sequences, chosen[:, :, None], 1)
        self.is_finished = np.take_along_axis(np.concatenate([self.is_finished, ended], 1), chosen, 1)

    def _reorder(self, parents: np.ndarray) -> None:
        """Let the engine's rows follow; sources with nothing left to find stay as they are."""
        still = np.arange(self.beams)[None]
        is_done = ~self.improvable
        if self.rules.early_stopping is True:
            is_done = is_done | self.is_finished.all(1, keepdims=True)
        rows = np.where(is_done, still, parents) + np.arange(self.batch)[:, None] * self.beams
        self.engine.reorder(rows.reshape(-1))

    def _check_improvable(self, length: int) -> None:
        """Note which sources' running beams may still beat their finished ones."""
        rules = self.rules
        if rules.early_stopping == "never" and rules.length_penalty > 0:
            length = rules.max_length
        hypothetical = length - rules.prompt_length
        possible = self.running_scores[:, :1] / np.float32(hypothetical**rules.length_penalty)
        worst = np.where(self.is_finished, self.finished_scores.min(1, keepdims=True), _NEVER)
        self.improvable &= (possible > worst).any(1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of probabilities, float32 as the logits [rows, vocab]."""
    shifted: np.ndarray = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def _best(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest of each row, largest first, and their places, both [rows, count]."""
    rows, width = scores.shape
    places = np.broadcast_to(np.arange(width), scores.shape)
    if width > 4 * count * _BLOCK:
        # The best lie in the blocks whose largest are the largest.
        blocks = np.full((rows, -(-width // _BLOCK) * _BLOCK), -np.inf, scores.dtype)
        blocks[:, :width] = scores
        blocks = blocks.reshape(rows, -1, _BLOCK)
        chosen = np.sort(np.argpartition(-blocks.max(-1), count - 1, axis=1)[:, :count])
        places = (chosen[:, :, None] * _BLOCK + np.arange(_BLOCK)).reshape(rows, -1)
        scores = np.take_along_axis(blocks, chosen[:, :, None], 1).reshape(rows, -1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)


def _trim(sequence: np.ndarray, rules: Rules) -> Found:
    ids = sequence[rules.prompt_length :]
    ends = np.flatnonzero(np.isin(ids, (*rules.eos_token_ids, -1)))
    has_ended = ends.size > 0 and ids[ends[0]] != -1
    return Found(ids[: ends[0] if ends.size else None].tolist(), "eos" if has_ended else "length")
