"""A question and a text that holds the answer: the answer is a span of the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.batch_session import open_encoder
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError
from llmfast.tasks._encoder import run_session, run_windows, softmax, trim
from llmfast.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Encoding

AUTO_MODEL = "AutoModelForQuestionAnswering"
OUTPUTS = ("start_logits", "end_logits")
TEXT_OPTION = "context"
INFER_OPTIONS = ("question", "max_tokens", "allow_no_answer")

MAX_TOKENS = 15
# A window's tokens, those it repeats, and the spans of it that are looked at: numbers of transformers' pipeline.
_WINDOW, _STRIDE, _CANDIDATES = 384, 128, 12


@dataclass(frozen=True)
class _Span:
    """An answer in one window: its score, and where in the context's characters it is."""

    score: float
    start: int
    end: int


def needed_options(_: ModelBundle) -> tuple[str, ...]:
    """Return the options that no text can be answered without."""
    return ("question",)


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    question: str = "",
    max_tokens: int = MAX_TOKENS,
    allow_no_answer: bool = False,
) -> list[dict[str, Any]]:
    """Answer a question from each text.

    A text longer than the model takes is read in overlapping windows; scores of the same answer add up.

    Args:
        bundle: the model.
        texts: contexts, in any order.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        question: what is asked of every text.
        max_tokens: most tokens of an answer.
        allow_no_answer: let the empty answer win where the model (of SQuAD 2's kind) finds it likelier.

    Returns:
        `text`, `question`, `answer`, `score`, `start` and `end` (of its characters) for each text, in their order.

    Raises:
        OptionError: no question, or an answer of less than a token.
        InputError: a text without a word, or a question that leaves no room for it.

    Source: `QuestionAnsweringPipeline` of transformers 4, with its defaults.
    """
    if max_tokens < 1:
        raise OptionError(f"--max-tokens {max_tokens}: must be at least 1")
    if not question.strip():
        raise OptionError("no question", "give --question TEXT and --context TEXT")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise InputError(f"context {number} of {len(texts)} is empty", "give a text that may hold the answer")
    session = open_encoder(bundle.model, provider, threads, is_batch=len(texts) > 1)
    found = find_answers(
        session, Tokenizer.load(bundle.path), bundle.longest_text(), question, texts, max_tokens, allow_no_answer
    )
    return [{"text": text, "question": question} | one for text, one in zip(texts, found, strict=True)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return f"{answer['answer'] or '(no answer)'}\n[{answer['start']}-{answer['end']}, score {answer['score']:.4f}]"


def find_answers(
    session: "onnxruntime.InferenceSession",
    tokenizer: Tokenizer,
    longest: int,
    question: str,
    texts: Sequence[str],
    max_tokens: int = MAX_TOKENS,
    allow_no_answer: bool = False,
) -> list[dict[str, Any]]:
    """Find the answer to a question in each text: `answer`, `score`, `start` and `end`, in their order.

    Args:
        session: the graph.
        tokenizer: the model's.
        longest: tokens that the model takes.
        question: what is asked.
        texts: the contexts.
        max_tokens: most tokens of an answer.
        allow_no_answer: let the empty answer win.

    Raises:
        InputError: a question that leaves no room for a text.
    """
    longest = min(longest, _WINDOW)
    [[alone]] = tokenizer.encode_windows([(question, "")], max_length=1 << 20)
    room = longest - len(alone)
    if room < 1:
        raise InputError(
            f"the question alone fills the {longest} tokens of the model, nothing of the context fits beside it",
            "ask a shorter question",
        )
    cls_id = tokenizer.special_id("cls_token")
    found = run_windows(
        tokenizer,
        [(question, text) for text in texts],
        lambda batch: score_positions(session, batch),
        lambda window, rows: _read(window, rows[0], rows[1], cls_id, max_tokens),
        longest,
        min(_STRIDE, longest // 2, room * 3 // 4),  # beside a long question, windows must still move on
        "only_second",
    )
    return [_best(text, windows, allow_no_answer) for text, windows in zip(texts, found, strict=True)]


def score_positions(session: "onnxruntime.InferenceSession", batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Compute the logits of an answer's start and of its end for a batch.

    Args:
        session: the graph.
        batch: `input_ids`, `attention_mask`, `token_type_ids`, int64 [batch, seq], of question and context.

    Returns:
        Two arrays, float32 [batch, seq].
    """
    return run_session(session, OUTPUTS, batch)


def _read(
    window: "Encoding", start_logits: np.ndarray, end_logits: np.ndarray, cls_id: int | None, max_tokens: int
) -> tuple[list[_Span], float]:
    """Return the likeliest answers in a window, best first, and how likely it holds none.

    Args:
        window: question and context.
        start_logits: float32 [seq].
        end_logits: float32 [seq].
        cls_id: the token at which models of SQuAD 2's kind put "no answer".
        max_tokens: most tokens of an answer.
    """
    ids, parts = np.array(window.ids), window.sequence_ids
    allowed = np.array([part == 1 for part in parts]) | (ids == cls_id)
    starts, ends = (softmax(np.where(allowed, logits[: len(ids)], -10000.0)) for logits in (start_logits, end_logits))
    no_answer = float(starts[0] * ends[0])
    starts[0] = ends[0] = 0.0
    # scores[i, k]: the answer from token i to token i + k.
    width = min(max_tokens, len(ids))
    padded = np.concatenate([ends, np.zeros(width)])
    scores = starts[:, None] * np.lib.stride_tricks.sliding_window_view(padded, width)[: len(ids)]
    spans = []
    for place in np.argsort(-scores, axis=None, kind="stable")[:_CANDIDATES]:
        first, length = divmod(int(place), width)
        last = first + length
        if last < len(ids) and allowed[first] and allowed[last]:
            spans.append(_Span(float(scores[first, length]), *_characters(window, first, last)))
    return spans, no_answer


def _characters(window: "Encoding", first: int, last: int) -> tuple[int, int]:
    """Return the characters of some tokens, of whole words where the tokenizer knows words."""
    words = window.word_ids[first], window.word_ids[last]
    spans = [None if word is None else window.word_to_chars(word, 1) for word in words]
    begin, end = (span or window.offsets[token] for span, token in zip(spans, (first, last), strict=True))
    return begin[0], end[1]


def _best(text: str, windows: Sequence[tuple[list[_Span], float]], allow_no_answer: bool) -> dict[str, Any]:
    """Return the best answer of all windows of a text."""
    answers: dict[str, _Span] = {}
    for span in (span for spans, _ in windows for span in spans):
        key = text[span.start : span.end].lower()
        first = answers.get(key, _Span(0.0, span.start, span.end))
        answers[key] = _Span(first.score + span.score, first.start, first.end)
    ranked = sorted(answers.values(), key=lambda span: -span.score)
    if allow_no_answer:
        ranked = sorted([*ranked, _Span(min(score for _, score in windows), 0, 0)], key=lambda span: -span.score)
    best = ranked[0] if ranked else _Span(0.0, 0, 0)
    start, end = trim(text, best.start, best.end)
    return {"answer": text[start:end], "score": best.score, "start": start, "end": end}
