"""The server's model crashes, and is there again."""

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from llmfast.errors import NativeCrashError
from llmfast.export.stage import export
from llmfast.infer.batch import Event
from llmfast.infer.generate import Generation
from llmfast.serve import scheduler as scheduler_module
from llmfast.serve.model import Facts
from tests.serving import chat, copy_with_template, processes, serving
from tests.tiny_encoder import WORDS, save_encoder


@pytest.fixture(scope="module")
def bundle(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_template(fp32_bundle, tmp_path_factory.mktemp("served") / "tiny")


def test_a_crash_of_the_model_is_answered_and_mended(bundle: Path) -> None:
    with serving(bundle, "--batch-size", "2") as server:
        expected = chat(server, "hello", max_tokens=8).choices[0].message.content
        for restarts in (1, 2, 3):
            os.kill(processes(server)[-1], signal.SIGSEGV)
            with pytest.raises(openai.InternalServerError):
                chat(server, "hello", max_tokens=8)
            assert chat(server, "hello", max_tokens=8).choices[0].message.content == expected
            assert server.figure("llmfast_model_restarts_total") == restarts
        os.kill(processes(server)[-1], signal.SIGSEGV)
        with contextlib.suppress(openai.APIError):
            chat(server, "hello", max_tokens=8)
        assert server.process.wait(30) == 9


def test_an_exception_of_onnx_runtime_is_answered_as_often_as_it_comes(tmp_path: Path) -> None:
    save_encoder(tmp_path / "checkpoint", vocab_size=len(WORDS))
    export(str(tmp_path / "checkpoint"), tmp_path / "encoder")
    tokenizer = tmp_path / "encoder" / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8")
    assert text.count('"by": 13') + text.count('"by":13') == 1
    tokenizer.write_text(re.sub('"by":( ?)13', r'"by":\g<1>99', text), encoding="utf-8")  # no row of the embedding
    with serving(tmp_path / "encoder") as server:
        for restarts in range(1, 5):  # more than there may be crashes in a minute
            with pytest.raises(openai.InternalServerError):
                server.client().embeddings.create(model="encoder", input="by")
            assert len(server.client().embeddings.create(model="encoder", input="cat").data) == 1
            assert server.figure("llmfast_model_restarts_total") == restarts
        assert any("the model failed: " in line for line in server.lines)
        assert "Traceback" not in "".join(server.lines)


class _Failing:
    """A worker whose first turn fails, in the place of one that runs a model."""

    def __init__(self, failures: "list[Exception]") -> None:
        self._failures = failures

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "describe":
            return Facts("fake", "text-generation", 2, 10, "")
        if self._failures:
            raise self._failures.pop()
        return [Event(number, "x", generation=Generation("x", 1, 1, 0.1, None, "eos")) for number, _ in arguments[0]]

    def close(self) -> None:
        pass


def test_a_turn_that_fails_is_told_to_those_in_it_and_the_next_one_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_BACKOFF_S", 0.001)
    failures: list[Exception] = [RuntimeError("Traceback\nonnxruntime: out of bounds")]

    async def ask() -> None:
        scheduler = scheduler_module.Scheduler(lambda: _Failing(failures), 9, 9)  # type: ignore[arg-type,return-value]
        restarts = []
        scheduler.restarted = lambda: restarts.append(1)
        for _ in range(3):
            hit = scheduler.submit({})
            turns = asyncio.create_task(scheduler.run())
            with pytest.raises(NativeCrashError, match="the model failed: onnxruntime: out of bounds"):
                await asyncio.wait_for(hit.next(), 10)
            answered = await asyncio.wait_for(scheduler.submit({}).next(), 10)
            assert answered.generation is not None
            turns.cancel()
            failures.append(RuntimeError("Traceback\nonnxruntime: out of bounds"))
        assert len(restarts) == 3
        scheduler.close()

    asyncio.run(ask())
