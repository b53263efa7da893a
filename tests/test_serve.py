"""The server, in a process of its own, asked by OpenAI's client and by hand."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from llmfast.export.stage import export
from llmfast.infer import stage as infer_stage
from llmfast.serve import stage as serve_stage
from tests.serving import Server, chat, copy_with_template, infer_text, processes, serving
from tests.tiny_encoder import WORDS, save_encoder


@pytest.fixture(scope="module")
def bundle(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_template(fp32_bundle, tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, "--batch-size", "4", "--max-tokens", "400") as running:
        yield running


def test_chat_answers_as_infer_does(server: Server, bundle: Path) -> None:
    answer = chat(server, "hello", max_tokens=20)
    assert answer.choices[0].message.content == infer_text(bundle, "hello", 20)
    assert answer.usage.prompt_tokens == len("u:hello;a:")
    assert answer.usage.completion_tokens <= 20
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_pieces_of_a_stream_make_the_whole(server: Server, bundle: Path) -> None:
    chunks = list(chat(server, "hello", max_tokens=20, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == infer_text(bundle, "hello", 20)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_go_on_with_the_prompt_as_it_is(server: Server, bundle: Path) -> None:
    answer = server.client().completions.create(model="tiny", prompt="hello", max_tokens=16)
    assert answer.choices[0].text == infer_text(bundle, "hello", 16, raw=True)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("hello")


def test_neighbours_do_not_change_an_answer(server: Server, bundle: Path) -> None:
    prompts = [f"{'ab' * (3 * number)} {number}" for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda prompt: chat(server, prompt, max_tokens=24), prompts))
    assert [answer.choices[0].message.content for answer in answers] == [
        infer_text(bundle, prompt, 24) for prompt in prompts
    ]


def test_requests_that_are_divided_among_threads_are_answered_as_alone(bundle: Path) -> None:
    prompts = [f"{'ab' * (3 * (number % 9))} {number}" for number in range(40)]
    with serving(bundle, "--batch-size", "16", "--threads", "2") as server, ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda prompt: chat(server, prompt, max_tokens=24), prompts))
        assert server.figure("llmfast_requests_active") == 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.choices[0].message.content == infer_text(bundle, prompt, 24)


def test_stop_strings_never_leak(server: Server, bundle: Path) -> None:
    whole = infer_text(bundle, "hello", 40, raw=True)
    stop = whole[6:8]
    answer = server.client().completions.create(model="tiny", prompt="hello", max_tokens=40, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_same_seed_same_answer(server: Server) -> None:
    texts = [
        chat(server, "x", max_tokens=16, temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    unsaid = {chat(server, "x", max_tokens=16, temperature=2.0).choices[0].message.content for _ in range(3)}
    assert len(unsaid) == 3


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": False}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"extra_body": {"top_k": 0.5}}, "top_k"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"top_q": 1}}, "top_q"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, None),
    ],
)  # fmt: skip
def test_impossible_requests_name_the_field(settings: dict[str, Any], param: str | None, server: Server) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **settings}
    with pytest.raises(openai.BadRequestError) as refusal:
        server.client().chat.completions.create(**asked)
    assert refusal.value.param == param
    assert "Traceback" not in refusal.value.message
    assert "--" not in refusal.value.message


def test_the_other_name_of_the_limit_counts_where_the_first_is_null(server: Server) -> None:
    answer = chat(server, "hello", max_tokens=3, extra_body={"max_completion_tokens": None})
    assert answer.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="`max_tokens` must be"):
        chat(server, "hello", max_tokens=0, extra_body={"max_completion_tokens": None})


def test_no_nucleus_is_the_likeliest_token(server: Server, bundle: Path) -> None:
    answer = chat(server, "hello", max_tokens=20, temperature=2.0, top_p=0)
    assert answer.choices[0].message.content == infer_text(bundle, "hello", 20)


def test_probabilities_of_the_chosen_tokens_are_refused_and_null_is_nothing(server: Server) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 1}
    with pytest.raises(openai.BadRequestError, match="`logprobs` is not supported"):
        server.client().completions.create(**asked, logprobs=0)
    for value in (None, False):
        assert server.client().completions.create(**asked, extra_body={"logprobs": value}).choices


def test_another_model_is_not_there(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="`tiny`"):
        server.client().chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.NotFoundError, match="text-generation"):
        server.client().embeddings.create(model="tiny", input="x")
    assert [model.id for model in server.client().models.list()] == ["tiny"]


def test_log_has_one_line_a_request_and_no_prompt(server: Server) -> None:
    time.sleep(0.2)  # lines of earlier requests come
    before = len(server.lines)
    httpx.get(f"{server.url}/v1/models?a%0Aerror: forged")
    httpx.get(f"{server.url}/%0Aerror:%20forged%1b[31m")
    chat(server, "a secret prompt", max_tokens=1)
    deadline = time.monotonic() + 60
    while len(server.lines) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # one too many would come too
    lines = server.lines[before:]
    assert len(lines) == 3
    assert not any("secret" in line or "\x1b" in line or line.startswith("error") for line in lines)


@pytest.mark.parametrize(
    ("number", "tell", "code"),
    [(signal.SIGTERM, os.kill, 143), (signal.SIGTERM, os.killpg, 143), (signal.SIGINT, os.killpg, 130)],
    ids=["term", "term-group", "int-group"],
)
def test_a_signal_lets_answers_end(number: int, tell: Callable[[int, int], None], code: int, bundle: Path) -> None:
    with serving(bundle) as server, ThreadPoolExecutor(1) as pool:
        model = processes(server)[-1]
        os.kill(model, signal.SIGSTOP)
        asked = pool.submit(lambda: list(chat(server, "hello", max_tokens=300, stream=True)))
        server.wait_for("llmfast_requests_active", 1)
        tell(server.process.pid, number)
        deadline = time.monotonic() + 60
        while not any("answering the requests under way" in line for line in server.lines):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(model, signal.SIGCONT)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in asked.result())
        assert text == infer_text(bundle, "hello", 300)
        assert server.process.wait(30) == code
        assert "Traceback" not in "".join(server.lines)


def test_a_second_signal_is_one_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve_stage._make_server(uvicorn.Config(lambda: None))
    for now, is_forced in ((100.0, False), (100.1, False), (103.0, True)):  # the second one is passed on by the parent
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        server.handle_exit(signal.SIGTERM, None)
        assert (server.should_exit, server.force_exit) == (True, is_forced)


def test_embeddings_are_those_of_infer(tmp_path: Path) -> None:
    save_encoder(tmp_path / "checkpoint", vocab_size=len(WORDS))
    export(str(tmp_path / "checkpoint"), tmp_path / "encoder")
    texts = [" ".join(WORDS[4:9]), WORDS[5]]
    expected = [answer["embedding"] for answer in infer_stage.answer(tmp_path / "encoder", texts, threads=1)]
    with serving(tmp_path / "encoder") as server:
        found = server.client().embeddings.create(model="encoder", input=texts)
        np.testing.assert_allclose([one.embedding for one in found.data], expected, atol=1e-6)
        assert found.usage.prompt_tokens == found.usage.total_tokens == (5 + 2) + (1 + 2)  # [CLS] and [SEP]
        assert server.figure("llmfast_prompt_tokens_total") == 10
        with pytest.raises(openai.BadRequestError, match="input"):
            server.client().embeddings.create(model="encoder", input=[])
        for name in ("input_type", "temperature"):
            with pytest.raises(openai.BadRequestError, match=f"unknown field `{name}`"):
                server.client().embeddings.create(model="encoder", input="x", extra_body={name: 1})
        assert server.client().embeddings.create(model="encoder", input="by", user="me", encoding_format="float").data
        nothing = {"encoding_format": None}
        assert server.client().embeddings.create(model="encoder", input="by", extra_body=nothing).data
        with pytest.raises(openai.NotFoundError, match="feature-extraction"):
            chat(server, "x")
        os.kill(processes(server)[-1], signal.SIGSEGV)
        with ThreadPoolExecutor(6) as pool:  # one meets the crash, the others wait until the model is there again
            asked = lambda _: httpx.post(f"{server.url}/v1/embeddings", json={"input": texts}, timeout=60)  # noqa: E731
            codes = sorted(answer.status_code for answer in pool.map(asked, range(6)))
        assert codes == [200] * 5 + [500]
        assert server.figure("llmfast_model_restarts_total") == 1
        server.wait_for("llmfast_requests_active", 0)
        for _ in range(3):
            os.kill(processes(server)[-1], signal.SIGSEGV)
            assert asked(0).status_code == 500
        assert server.process.wait(30) == 9


def test_the_page_talks_with_the_model(server: Server, bundle: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By

    browser.get(server.url)
    browser.find_element(By.ID, "text").send_keys("hello\n")
    deadline = time.monotonic() + 60
    while "tokens" not in browser.find_element(By.ID, "note").text:
        assert time.monotonic() < deadline, browser.find_element(By.TAG_NAME, "body").text
        time.sleep(0.1)
    shown = [line.get_attribute("textContent") for line in browser.find_elements(By.CSS_SELECTOR, "#talk p")]
    assert shown == ["hello", infer_text(bundle, "hello", 400)]
    assert browser.find_element(By.ID, "model").text == "tiny"
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []


def test_the_script_that_puts_load_on_it_says_why_no_server_starts(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "bench_serve.py"
    run = subprocess.run([sys.executable, script, tmp_path / "nowhere"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"the server did not start: error: not found: `{tmp_path / 'nowhere'}`")
