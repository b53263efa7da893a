from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llmfast.batch_session import BatchSession, open_encoder
from llmfast.bench.subject import Subject
from llmfast.bundle import ModelBundle
from llmfast.export.stage import ExportOptions, export
from llmfast.runtime import open_session
from llmfast.tasks import feature_extraction
from tests.tiny_encoder import WORDS, save_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder / "source", vocab_size=len(WORDS))
    return export(str(folder / "source"), folder / "bundle", ExportOptions(task="feature-extraction"))


def make_batch(rows: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    mask = (np.arange(length) < rng.integers(1, length + 1, (rows, 1))).astype(np.int64)
    ids = rng.integers(4, len(WORDS), (rows, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def save_sum(path: Path, batch: int | str, output: int | str) -> Path:
    """Write a graph that adds up the columns of a float32 [batch, 2]; its output says it has `output` rows."""
    shapes = {"x": [batch, 2], "y": [output]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    nodes = [helper.make_node("ReduceSum", ["x", "axis"], ["y"], keepdims=0)]
    graph = helper.make_graph(nodes, "sum", [x], [y], [axis])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize("length", [3, 37])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 61])
def test_rows_apart_equal_rows_together(encoder: ModelBundle, rows: int, length: int) -> None:
    batch = make_batch(rows, length)
    apart = open_encoder(encoder.model, threads=2, is_batch=True)
    assert isinstance(apart, BatchSession)
    for outputs in (["last_hidden_state", "sentence_embedding"], None):
        expected = open_session(encoder.model, threads=1).run(outputs, batch)
        for one, other in zip(apart.run(outputs, batch), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_texts_in_a_batch_get_what_each_gets_alone(encoder: ModelBundle) -> None:
    texts = ["the cat sat", "two dogs run", "a mat", "the the the the the the the"] * 9
    together = feature_extraction.answer(encoder, texts, threads=2)
    for text, answer in zip(texts, together, strict=True):
        [alone] = feature_extraction.answer(encoder, [text], threads=2)
        np.testing.assert_allclose(answer["embedding"], alone["embedding"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "length", "parts"), [(8, 128, 4), (32, 64, 8), (2, 500, 2), (3, 8, 2), (40, 1, 2)])
def test_parts_of_a_batch(encoder: ModelBundle, rows: int, length: int, parts: int) -> None:
    class Counting:
        def __init__(self) -> None:
            self.sizes: list[int] = []

        def run(self, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            self.sizes.append(len(feeds["ids"]))
            return [feeds["ids"].sum(1)]

    session = Counting()
    ids = np.random.default_rng(0).integers(0, 9, (rows, length))
    [sums] = BatchSession(session, threads=2).run(["sum"], {"ids": ids})  # type: ignore[arg-type]
    assert (sums == ids.sum(1)).all()
    assert len(session.sizes) == parts
    assert max(session.sizes) - min(session.sizes) <= 1


def test_what_is_not_run_apart(encoder: ModelBundle, tmp_path: Path) -> None:
    free, fixed, one = (
        save_sum(tmp_path / f"{name}.onnx", *rows)
        for name, rows in {"free": ("batch", "batch"), "fixed": (4, 4), "one": ("batch", 4)}.items()
    )
    assert isinstance(open_encoder(free, threads=2, is_batch=True), BatchSession)
    for path, threads, is_batch in ((fixed, 2, True), (one, 2, True), (free, 1, True), (free, 2, False)):
        session = open_encoder(path, threads=threads, is_batch=is_batch)
        assert not isinstance(session, BatchSession)
        [sums] = session.run(None, {"x": np.ones((4, 2), np.float32)})
        assert (sums == 2).all()


def test_bench_opens_an_encoder_as_infer_does(encoder: ModelBundle) -> None:
    subject = Subject(encoder.path, threads=2, is_batch=True)
    assert isinstance(subject.session, BatchSession)
    assert subject.facts()["placement"]["CPUExecutionProvider"] > 0
    assert subject.encoder(8) is subject.session
    assert not isinstance(subject.encoder(1), BatchSession)
    assert subject.encoder(1) is subject.encoder(1)
