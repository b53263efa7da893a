"""What the tasks of encoders share: texts in batches of like length, one pass through a session, labels and scores."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, UnsupportedError
from llmfast.report import note, progress
from llmfast.tokenizer import Text, Tokenizer

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Encoding

Found = TypeVar("Found")

# Rows of one pass. The more there are the more of them is padding, and one pass of 32 fills the cores already.
BATCH_SIZE = 32


def run_texts(
    bundle: ModelBundle, texts: Sequence[Text], compute: Callable[[Mapping[str, np.ndarray]], np.ndarray]
) -> list[np.ndarray]:
    """Encode texts and compute one row for each.

    A text longer than the model takes is cut at its end, with a note.

    Args:
        bundle: holds the tokenizer and says how long a text may be.
        texts: texts, or pairs of them, in any order.
        compute: takes int64 arrays [batch, seq] by input name, returns [batch, any].

    Returns:
        A row per text, in the order of the texts.

    Raises:
        InputError: no tokenizer, or a text without a token.
    """
    tokenizer = Tokenizer.load(bundle.path)
    found = run_windows(
        tokenizer, texts, lambda batch: [compute(batch)], lambda window, row: row[0], bundle.longest_text()
    )
    return [row for (row,) in found]


def run_windows(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    compute: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]],
    read: Callable[["Encoding", Sequence[np.ndarray]], Found],
    max_length: int,
    stride: int | None = None,
    strategy: str = "longest_first",
    batch_size: int = BATCH_SIZE,
) -> list[list[Found]]:
    """Encode texts, as one window of tokens or several, and read something from each.

    Args:
        tokenizer: the model's.
        texts: in any order; short and long ones are kept apart, so that little is padding.
        compute: takes int64 arrays [batch, seq] by input name, returns arrays [batch, ...].
        read: makes of a window and its row of each array what is kept; a row of [seq, ...] is as long as
            the longest window beside it.
        max_length: tokens of a window.
        stride: tokens that a window repeats of the one before; None cuts a text after its first, with a note.
        strategy: what of a pair is cut, see `Tokenizer.encode_windows`.
        batch_size: windows in a pass.

    Returns:
        What was read from the windows of each text, in the order of the texts.

    Raises:
        InputError: a text without a token, or that can't be cut to fit.
    """
    order = sorted(range(len(texts)), key=lambda index: len("".join(texts[index])))
    found: dict[int, list[Found]] = {}
    cut = 0
    with progress("running", len(texts)) as advance:
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            encoded = tokenizer.encode_windows([texts[index] for index in chosen], max_length, stride or 0, strategy)
            for index, windows in zip(chosen, encoded, strict=True):
                if len(windows[0]) == 0:
                    raise InputError(f"text {index + 1} of {len(texts)} has no token", "leave empty texts out")
            if stride is None:
                cut += sum(len(windows) > 1 for windows in encoded)
                encoded = [windows[:1] for windows in encoded]
            flat = [window for windows in encoded for window in windows]
            kept: list[Found] = []
            for first in range(0, len(flat), batch_size):
                rows = flat[first : first + batch_size]
                arrays = compute(tokenizer.pad(rows))
                kept += [read(window, [array[row] for array in arrays]) for row, window in enumerate(rows)]
            rest = iter(kept)
            for index, windows in zip(chosen, encoded, strict=True):
                found[index] = list(islice(rest, len(windows)))
            advance(len(chosen))
    if cut:
        note(f"note: cut to the {max_length} tokens that the model takes: {cut} of the {len(texts)} texts")
    return [found[index] for index in range(len(texts))]


def run_session(
    session: "onnxruntime.InferenceSession", outputs: Sequence[str], batch: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Run an encoder for some of its outputs.

    Args:
        session: an encoder's graph.
        outputs: their names.
        batch: int64 [batch, seq] by input name, or a float32 image or sound; those that the graph does not take
            are left out.

    Returns:
        float32, one array per output.

    Raises:
        UnsupportedError: the graph takes another input or another size, or lacks one of the outputs.
    """
    shapes = {value.name: value.shape for value in session.get_inputs()}
    inputs = list(shapes)
    offered = [value.name for value in session.get_outputs()]
    if not set(inputs) <= set(batch) or not set(outputs) <= set(offered):
        raise UnsupportedError(
            f"not an encoder for this task: inputs {', '.join(inputs)}; outputs {', '.join(offered)}",
            f"needs the output `{'`, `'.join(outputs)}`, and inputs of {', '.join(batch)}",
        )
    for name, shape in shapes.items():
        for axis, (wanted, given) in enumerate(zip(shape, batch[name].shape, strict=False)):
            if isinstance(wanted, int) and wanted != given:
                raise UnsupportedError(
                    f"axis {axis} of the input `{name}` is fixed at {wanted}, and {given} are given",
                    "export the model with dynamic axes",
                )
    values = session.run(list(outputs), {name: batch[name] for name in inputs})
    return [value.astype(np.float32, copy=False) for value in values]


def score_tokens(session: "onnxruntime.InferenceSession", batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the logits of every token of a batch.

    Args:
        session: the graph.
        batch: `input_ids`, `attention_mask`, `token_type_ids`, int64 [batch, seq].

    Returns:
        float32 [batch, seq, labels], or the vocabulary in place of labels.
    """
    return run_session(session, ("logits",), batch)[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits into shares of 1 along the last axis, float64."""
    powers: np.ndarray = np.exp(logits - logits.max(-1, keepdims=True).astype(np.float64))
    shares: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return shares


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Turn logits into shares of 1, each on its own, float64; no logit overflows."""
    shares: np.ndarray = np.exp(-np.logaddexp(0, -logits.astype(np.float64)))
    return shares


def label_scores(logits: np.ndarray, bundle: ModelBundle) -> np.ndarray:
    """Turn a classifier's logits into scores, float64: shares of 1 when one label holds, else each on its own.

    Args:
        logits: float32 [classes].
        bundle: its manifest says what kind of classifier it is.
    """
    problem = bundle.manifest.architecture.get("problem_type", "single_label_classification")
    if problem == "multi_label_classification":
        return sigmoid(logits)
    return logits.astype(np.float64) if problem == "regression" else softmax(logits)


def label_names(bundle: ModelBundle, count: int) -> list[str]:
    """Return the names of a model's labels; one that the manifest lacks is `LABEL_0`, as in transformers."""
    names = [str(name) for name in bundle.manifest.architecture.get("labels") or []]
    return [names[index] if index < len(names) else f"LABEL_{index}" for index in range(count)]


def trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a span of a text without the space around it, which some tokenizers count to their words."""
    span = text[start:end]
    start += len(span) - len(span.lstrip())
    return start, start + len(span.strip())
