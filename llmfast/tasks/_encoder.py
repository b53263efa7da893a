"""What the tasks of encoders share: texts in batches of like length, and one pass through a session."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, UnsupportedError
from llmfast.report import note
from llmfast.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnxruntime

# Rows of one pass. The more there are the more of them is padding, and one pass of 32 fills the cores already.
_BATCH_SIZE = 32


def run_texts(
    bundle: ModelBundle, texts: Sequence[str], compute: Callable[[Mapping[str, np.ndarray]], np.ndarray]
) -> list[np.ndarray]:
    """Encode texts and compute one row for each.

    A text longer than the model takes is cut at its end, with a note.

    Args:
        bundle: holds the tokenizer and says how long a text may be.
        texts: in any order; short and long ones are kept apart, so that little is padding.
        compute: takes int64 arrays [batch, seq] by input name, returns [batch, any].

    Returns:
        A row per text, in the order of the texts.

    Raises:
        InputError: no tokenizer, or a text without a token.
    """
    tokenizer = Tokenizer.load(bundle.path)
    max_length = bundle.longest_text()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows: dict[int, np.ndarray] = {}
    cut = 0
    for start in range(0, len(order), _BATCH_SIZE):
        chosen = order[start : start + _BATCH_SIZE]
        batch = tokenizer.encode_batch([texts[index] for index in chosen], max_length)
        empty = np.flatnonzero(batch["attention_mask"].sum(1) == 0)
        if empty.size:
            raise InputError(f"text {chosen[empty[0]] + 1} of {len(texts)} has no token", "leave empty texts out")
        full = [index for index, row in zip(chosen, batch["attention_mask"], strict=True) if row.sum() == max_length]
        cut += sum(len(tokenizer.encode(texts[index])) > max_length for index in full)
        rows.update(zip(chosen, compute(batch), strict=True))
    if cut:
        note(f"note: cut to the {max_length} tokens that the model takes: {cut} of the {len(texts)} texts")
    return [rows[index] for index in range(len(texts))]


def run_session(session: "onnxruntime.InferenceSession", output: str, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Run an encoder for one of its outputs.

    Args:
        session: an encoder's graph.
        output: the output's name.
        batch: int64 [batch, seq] by input name; those that the graph does not take are left out.

    Returns:
        float32.

    Raises:
        UnsupportedError: the graph takes another input, or has no such output.
    """
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    unknown = [name for name in inputs if name not in batch]
    if unknown or output not in outputs:
        raise UnsupportedError(
            f"not an encoder for this task: inputs {', '.join(inputs)}; outputs {', '.join(outputs)}",
            f"needs the output `{output}`, and inputs of {', '.join(batch)}",
        )
    values: np.ndarray = session.run([output], {name: batch[name] for name in inputs})[0]
    return values.astype(np.float32, copy=False)
