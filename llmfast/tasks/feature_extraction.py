"""A text becomes one vector: search, clustering, similarity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.bundle import ModelBundle, stage_file
from llmfast.errors import OptionError
from llmfast.report import note
from llmfast.runtime import open_session
from llmfast.tasks._encoder import run_session, run_texts

if TYPE_CHECKING:
    import onnxruntime

AUTO_MODEL = "AutoModel"
OUTPUTS = ("last_hidden_state", "sentence_embedding")
INFER_OPTIONS = ("output", "overwrite")


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Compute the embedding of each text, pooled as the model's manifest says.

    Args:
        bundle: the model; its tokenizer cuts texts that are longer than the model takes.
        texts: in any order.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        output: a `.npy` file that gets the embeddings, float32 [texts, hidden]; the answers then lack them.
        overwrite: replace an existing file.

    Returns:
        `text` and `embedding` (float32 [hidden]) of each text, in their order; of several texts also `cosine`,
        the similarity with the first.

    Raises:
        OptionError: an output that is no `.npy` file, or nothing to overwrite.
        OutputExistsError: the output exists.
        ResourceError: it can't be written.
    """
    if output is None:
        if overwrite:
            raise OptionError("--overwrite without --output", "name the file: --output FILE.npy")
        return _describe(texts, _embed_texts(bundle, texts, provider, threads))
    if output.suffix != ".npy":
        raise OptionError(f"--output `{output}`: not a .npy file", "embeddings as text: --format jsonl > FILE")
    with stage_file(output, overwrite) as staged:
        vectors = _embed_texts(bundle, texts, provider, threads)
        with staged.open("wb") as file:
            np.save(file, np.stack(vectors))
    note(f"{output}: {len(vectors)} embeddings of {len(vectors[0])} numbers")
    return [{key: value for key, value in one.items() if key != "embedding"} for one in _describe(texts, vectors)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people: how near it is to the first of several texts, or the vector."""
    if "cosine" in answer:
        return f"{answer['cosine']:.4f} {answer['text']}"
    return " ".join(f"{value:.6f}" for value in answer.get("embedding", ()))


def embed(session: "onnxruntime.InferenceSession", batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the embeddings of a batch.

    A graph that has no `sentence_embedding`, as other exporters write them, gets the mean over its tokens.

    Args:
        session: the graph.
        batch: `input_ids`, `attention_mask`, `token_type_ids`, int64 [batch, seq].

    Returns:
        float32 [batch, hidden].
    """
    if any(value.name == "sentence_embedding" for value in session.get_outputs()):
        return run_session(session, ["sentence_embedding"], batch)[0]
    hidden = run_session(session, ["last_hidden_state"], batch)[0]
    mask = batch["attention_mask"][..., None].astype(np.float32)
    means: np.ndarray = (hidden * mask).sum(1) / np.maximum(mask.sum(1), 1)
    return means


def _embed_texts(bundle: ModelBundle, texts: Sequence[str], provider: str, threads: int | None) -> list[np.ndarray]:
    session = open_session(bundle.model, provider, threads)
    return run_texts(bundle, texts, lambda batch: embed(session, batch))


def _describe(texts: Sequence[str], vectors: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    for text, vector in zip(texts, vectors, strict=True):
        cosine = {"cosine": _cosine(vectors[0], vector)} if len(texts) > 1 else {}
        answers.append({"text": text} | cosine | {"embedding": vector})
    return answers


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(left) * np.linalg.norm(right)
    return float(np.clip(left @ right / max(lengths, np.finfo(np.float64).tiny), -1, 1))
