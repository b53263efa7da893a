"""Tasks of text encoders on the command line, and the contract of every task."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from typer.main import get_command
from typer.testing import CliRunner

from llmfast import registry
from llmfast.cli import app
from llmfast.export.stage import export
from llmfast.infer.stage import text_option
from tests.tiny_tasks import CONTEXT, PIECES, QUESTION, SENTENCES, TASKS, Head, save_head


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_infer_of_every_task_on_the_command_line(heads: Callable[..., Head], tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(SENTENCES))
    ner, qa, bert, ranker = (heads(task).bundle.path for task in TASKS)
    for arguments, keys in (
        ([ner, "-p", SENTENCES[0]], {"entities"}),
        (
            [qa, "--question", QUESTION, "--context", CONTEXT, "--allow-no-answer", "--max-tokens", 3],
            {"answer", "score"},
        ),
        ([bert, "-p", "the [MASK] sat", "--top-k", 2], {"masks"}),
        ([ranker, "--query", QUESTION, "--document", SENTENCES[0]], {"index", "score"}),
    ):
        result = run("infer", *arguments, "--format", "json")
        assert result.exit_code == 0, result.output
        assert keys <= set(json.loads(result.stdout))
        assert run("infer", *arguments).stdout.strip()
    result = run("infer", ranker, "--query", QUESTION, "--input", file, "--format", "jsonl")
    ranks = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(one["text"] for one in ranks) == sorted(SENTENCES)
    assert [one["score"] for one in ranks] == sorted((one["score"] for one in ranks), reverse=True)
    assert len(run("infer", ranker, "--query", QUESTION, "--input", file, "--top-k", 2).stdout.splitlines()) == 2
    result = run("infer", ner, "-p", SENTENCES[0], "-p", SENTENCES[2], "--format", "json")
    assert [one["text"] for one in json.loads(result.stdout)] == [SENTENCES[0], SENTENCES[2]]


def test_embeddings_on_the_command_line(tmp_path: Path) -> None:
    save_head(tmp_path / "source", "bert", "AutoModel", vocab_size=len(PIECES))
    bundle, vectors = export(str(tmp_path / "source"), tmp_path / "bundle").path, tmp_path / "vectors.npy"
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(SENTENCES))
    result = run("infer", bundle, "--input", file, "--format", "jsonl")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    embeddings = np.array([one["embedding"] for one in found])
    cosines = embeddings @ embeddings[0] / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(embeddings[0])
    np.testing.assert_allclose([one["cosine"] for one in found], cosines, rtol=1e-6)
    lines = run("infer", bundle, "-p", SENTENCES[0], "-p", SENTENCES[1]).stdout.splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == ["1.0000", f"{cosines[1]:.4f}"]
    result = run("infer", bundle, "--input", file, "-o", vectors)
    assert result.exit_code == 0, result.output
    assert "vectors.npy: 4 embeddings of 32 numbers" in result.stderr
    saved = np.load(vectors)
    assert saved.dtype == np.float32
    np.testing.assert_allclose(saved, embeddings, rtol=1e-6)
    before = vectors.read_bytes()
    for more, code, words in (
        (["-o", vectors], 8, "output exists"),
        (["-o", tmp_path / "vectors.txt"], 2, "not a .npy file"),
        (["-o", tmp_path / "none" / "vectors.npy"], 6, "cannot write"),
        (["-o", tmp_path, "--overwrite"], 2, "not a .npy file"),
        (["--overwrite"], 2, "--overwrite without --output"),
    ):
        result = run("infer", bundle, "-p", "cat", *more)
        assert (result.exit_code, words in result.stderr) == (code, True), result.output
    assert vectors.read_bytes() == before
    assert run("infer", bundle, "-p", "cat", "-o", vectors, "--overwrite").exit_code == 0
    assert np.load(vectors).shape == (1, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "source", "texts.txt", "vectors.npy"]


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("fill-mask", ["-p", "[MASK]", "--question", "who"], ["--question is for question-answering", "for fill-mask"]),
        ("question-answering", ["-p", "the cat"], ["--prompt is for ", "is for question-answering"]),
        ("question-answering", ["--question", "who"], ["no text to run on", "--context TEXT"]),
        ("question-answering", ["--context", "the cat"], ["no question"]),
        ("text-ranking", ["--document", "the cat"], ["no query"]),
        ("text-ranking", ["--query", "cat"], ["--document TEXT"]),
        ("text-ranking", ["--query", "cat", "--document", "a", "--input", "x"], ["exclude each other"]),
        ("token-classification", ["-p", "cat", "-o", "x.npy"], ["--output is for feature-extraction"]),
        ("token-classification", ["-p", "cat", "--temperature", "1"], ["--temperature is for text-generation"]),
    ],
)
def test_options_that_do_not_fit(heads: Callable[..., Head], task: str, arguments: list[str], words: list[str]) -> None:
    result = run("infer", heads(task).bundle.path, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("name", registry.names("tasks"))
def test_task_honours_the_contract(name: str) -> None:
    plugin = registry.load("tasks", name)
    assert plugin.__doc__
    assert plugin.OUTPUTS
    assert hasattr(transformers, plugin.AUTO_MODEL)
    parameters = inspect.signature(plugin.answer).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert takes_any or set(plugin.INFER_OPTIONS) <= set(parameters)
    known = {parameter.name for parameter in get_command(app).commands["infer"].params}
    assert {*plugin.INFER_OPTIONS, text_option(name)} <= known
