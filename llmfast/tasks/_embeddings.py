"""What the tasks that give vectors share: vectors as answers with cosines, or as a file of NumPy's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import stage_file
from llmfast.errors import OptionError
from llmfast.report import note

EMBEDDING_OPTIONS = ("output", "overwrite")


def answer_embeddings(
    kind: str,
    texts: Sequence[str],
    embed: Callable[[], Sequence[np.ndarray]],
    output: Path | None,
    overwrite: bool,
) -> list[dict[str, Any]]:
    """Compute vectors and describe them.

    Args:
        kind: the key of the texts in the answers: `text`, or `image` for paths.
        texts: what the vectors are of.
        embed: computes them, float32 [hidden] each; not called when the options are wrong.
        output: a `.npy` file that gets the vectors, float32 [texts, hidden]; the answers then lack them.
        overwrite: replace an existing file.

    Returns:
        The text and its `embedding` for each; of several texts also `cosine`, the similarity with the first.

    Raises:
        OptionError: an output that is no `.npy` file, or nothing to overwrite.
        OutputExistsError: the output exists.
        ResourceError: it can't be written.
    """
    if output is None:
        if overwrite:
            raise OptionError("--overwrite without --output", "name the file: --output FILE.npy")
        return _describe(kind, texts, embed())
    if output.suffix != ".npy":
        raise OptionError(f"--output `{output}`: not a .npy file", "embeddings as text: --format jsonl > FILE")
    with stage_file(output, overwrite) as staged:
        vectors = embed()
        with staged.open("wb") as file:
            np.save(file, np.stack(vectors))
    note(f"{output}: {len(vectors)} embeddings of {len(vectors[0])} numbers")
    described = _describe(kind, texts, vectors)
    return [{key: value for key, value in one.items() if key != "embedding"} for one in described]


def spell_embedding(answer: dict[str, Any], kind: str) -> str:
    """Return an answer as a line for people: how near it is to the first of several, or the vector."""
    if "cosine" in answer:
        return f"{answer['cosine']:.4f} {answer[kind]}"
    return " ".join(f"{value:.6f}" for value in answer.get("embedding", ()))


def _describe(kind: str, texts: Sequence[str], vectors: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    for text, vector in zip(texts, vectors, strict=True):
        cosine = {"cosine": _cosine(vectors[0], vector)} if len(texts) > 1 else {}
        answers.append({kind: text} | cosine | {"embedding": vector})
    return answers


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(left) * np.linalg.norm(right)
    return float(np.clip(left @ right / max(lengths, np.finfo(np.float64).tiny), -1, 1))
