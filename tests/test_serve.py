"""The server, in a process of its own, asked by OpenAI's client and by hand."""

import asyncio
import contextlib
import errno
import gzip
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from llmfast.errors import NativeCrashError
from llmfast.export.stage import export
from llmfast.infer import stage as infer_stage
from llmfast.infer.batch import Event
from llmfast.infer.generate import Generation
from llmfast.serve import scheduler as scheduler_module
from llmfast.serve import stage as serve_stage
from llmfast.serve.model import Facts
from tests.tiny_encoder import WORDS, save_encoder

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"


@dataclass
class Server:
    """A server process that a test may stop."""

    process: "subprocess.Popen[str]"
    url: str
    lines: list[str]

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **settings})

    def figure(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found is not None
        return float(found.group(1))

    def wait_for(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 60
        while self.figure(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.figure(name)}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(model: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmfast", "serve", str(model), "--port", "0", "--threads", "1", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"on (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
        yield Server(process, found.group(1), lines)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def bundle(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(fp32_bundle, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, "--batch-size", "4", "--max-tokens", "400") as running:
        yield running


def _expected(bundle: Path, prompt: str, max_tokens: int, raw: bool = False) -> str:
    return infer_stage.infer(bundle, prompt, emit=lambda piece: None, max_tokens=max_tokens, raw=raw, threads=1).text


def _chat(server: Server, text: str, **settings: Any) -> Any:
    return server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], **settings
    )


def test_chat_answers_as_infer_does(server: Server, bundle: Path) -> None:
    answer = _chat(server, "hello", max_tokens=20)
    assert answer.choices[0].message.content == _expected(bundle, "hello", 20)
    assert answer.usage.prompt_tokens == len("u:hello;a:")
    assert answer.usage.completion_tokens <= 20
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_pieces_of_a_stream_make_the_whole(server: Server, bundle: Path) -> None:
    chunks = list(_chat(server, "hello", max_tokens=20, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == _expected(bundle, "hello", 20)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_go_on_with_the_prompt_as_it_is(server: Server, bundle: Path) -> None:
    answer = server.client().completions.create(model="tiny", prompt="hello", max_tokens=16)
    assert answer.choices[0].text == _expected(bundle, "hello", 16, raw=True)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("hello")


def test_neighbours_do_not_change_an_answer(server: Server, bundle: Path) -> None:
    prompts = [f"{'ab' * (3 * number)} {number}" for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda prompt: _chat(server, prompt, max_tokens=24), prompts))
    assert [answer.choices[0].message.content for answer in answers] == [
        _expected(bundle, prompt, 24) for prompt in prompts
    ]


def test_stop_strings_never_leak(server: Server, bundle: Path) -> None:
    whole = _expected(bundle, "hello", 40, raw=True)
    stop = whole[6:8]
    answer = server.client().completions.create(model="tiny", prompt="hello", max_tokens=40, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_same_seed_same_answer(server: Server) -> None:
    texts = [
        _chat(server, "x", max_tokens=16, temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"temperature": -1}, None),
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


def test_another_model_is_not_there(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="`tiny`"):
        server.client().chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.NotFoundError, match="text-generation"):
        server.client().embeddings.create(model="tiny", input="x")
    assert [model.id for model in server.client().models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"[]", {}, 422),
        (b" " * (2 << 20), {}, 413),
        (gzip.compress(b"{}", mtime=0), {"content-encoding": "gzip"}, 415),
        (b"{}", {"host": "evil.example"}, 403),
        (b"{}", {"origin": "http://evil.example"}, 403),
        (b"{}", {"origin": "null"}, 403),
    ],
)
def test_hostile_requests_are_refused_at_the_gate(
    body: bytes, headers: dict[str, str], status: int, server: Server
) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "access-control-allow-origin" not in answer.headers


def test_bodies_in_chunks_are_limited_too(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 16)

    with contextlib.suppress(httpx.WriteError):  # the server need not read on
        assert httpx.post(f"{server.url}/v1/completions", content=endless()).status_code == 413
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_log_has_one_line_a_request_and_no_prompt(server: Server) -> None:
    before = len(server.lines)
    httpx.get(f"{server.url}/v1/models?a%0Aerror: forged")
    httpx.get(f"{server.url}/%0Aerror:%20forged%1b[31m")
    _chat(server, "a secret prompt", max_tokens=1)
    time.sleep(0.2)
    lines = server.lines[before:]
    assert len(lines) == 3
    assert not any("secret" in line or "\x1b" in line or line.startswith("error") for line in lines)


def test_a_client_that_leaves_frees_its_row(server: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 400, "stream": True}
    for _ in range(8):  # twice as many as there are rows
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
    server.wait_for("llmfast_requests_active", 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions", json={**body, "stream": False}, timeout=httpx.Timeout(60, read=0.005)
        )
    server.wait_for("llmfast_requests_active", 0)


def test_who_does_not_fit_the_queue_is_told_to_come_back(bundle: Path) -> None:
    with serving(bundle, "--batch-size", "1", "--queue-size", "1", "--queue-timeout", "1000") as server:
        body = {"prompt": "hello", "max_tokens": 400}
        with ThreadPoolExecutor(6) as pool:
            asked = lambda _: httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)  # noqa: E731
            answers = list(pool.map(asked, range(6)))
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 2
        assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)


def test_who_waits_too_long_is_told(bundle: Path) -> None:
    body = {"prompt": "hello", "max_tokens": 400}
    with serving(bundle, "--batch-size", "1", "--queue-timeout", "0.2", "--timeout", "3") as server:
        url, model = f"{server.url}/v1/completions", _processes(server)[-1]
        os.kill(model, signal.SIGSTOP)
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(4)]
            server.wait_for("llmfast_requests_waiting", 3)
            time.sleep(0.3)
            os.kill(model, signal.SIGCONT)
            answers = [one.result() for one in asked]
        assert sorted(answer.status_code for answer in answers) == [200, 503, 503, 503]
        assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 503)
        os.kill(model, signal.SIGSTOP)
        assert httpx.post(url, json=body, timeout=60).status_code == 504
        os.kill(model, signal.SIGCONT)
        server.wait_for("llmfast_requests_active", 0)
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(model, signal.SIGSTOP)
            *_, error, done = [line for line in lines if line]
        assert ("too long" in error, done) == (True, "data: [DONE]")
        os.kill(model, signal.SIGCONT)
        server.wait_for("llmfast_requests_active", 0)


def test_slow_senders_are_hung_up_on(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    begun = [b"", head, head + b"Content-Length: 9\r\n\r\n{"]
    later = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=14)) for _ in range(4)]
        for connection, sent in zip(slow, [*begun, later], strict=True):
            connection.sendall(sent)
        answer = b""
        while not answer.endswith(b"}"):
            answer += slow[3].recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        slow[3].sendall(head)  # the second request of a connection is no other
        assert _chat(server, "hello", max_tokens=4).usage.completion_tokens <= 4
        assert slow[0].recv(1 << 16) == slow[1].recv(1 << 16) == slow[3].recv(1 << 16) == b""
        assert b" 408 " in slow[2].recv(1 << 16)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no limit for stalled writes")
def test_connections_of_clients_that_never_read_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_stage, "_WRITE_STALL_S", 1)
    with serve_stage._listen("127.0.0.1", 0) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            accepted.settimeout(20)
            with pytest.raises(OSError, match="timed out") as stalled:
                while True:
                    accepted.sendall(b" " * (1 << 20))
            assert stalled.value.errno == errno.ETIMEDOUT


def test_a_storm_of_clients_that_leave_leaves_nothing(bundle: Path) -> None:
    with serving(bundle, "--batch-size", "2") as server:
        expected = _chat(server, "hello", max_tokens=8).choices[0].message.content
        folder = Path(f"/proc/{_processes(server)[1]}")
        before = len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))
        port = int(server.url.rpartition(":")[2])
        for number in range(500):
            body = json.dumps({"prompt": f"{number}", "max_tokens": 300, "stream": number % 2 == 0}).encode()
            lines = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(lines.encode() + body[: None if number % 5 else -3])
                if number % 10 == 0:
                    time.sleep(0.02)  # it has begun to be answered
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", number % 3 > 0, 0))
        server.wait_for("llmfast_requests_active", 0)
        server.wait_for("llmfast_requests_waiting", 0)
        deadline = time.monotonic() + 30
        while (len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))) != before:
            assert time.monotonic() < deadline, f"{list((folder / 'fd').iterdir())}, {before}"
            time.sleep(0.1)
        assert _chat(server, "hello", max_tokens=8).choices[0].message.content == expected


def _processes(server: Server) -> list[int]:
    """Return the process that was started, its child, which serves, and the child's, which holds the model."""
    pids, children = [], [server.process.pid]
    while children:
        pids.append(children[0])
        threads = Path(f"/proc/{pids[-1]}/task").iterdir()
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return pids


def test_a_crash_of_the_model_is_answered_and_mended(bundle: Path) -> None:
    with serving(bundle, "--batch-size", "2") as server:
        expected = _chat(server, "hello", max_tokens=8).choices[0].message.content
        for restarts in (1, 2, 3):
            os.kill(_processes(server)[-1], signal.SIGSEGV)
            with pytest.raises(openai.InternalServerError):
                _chat(server, "hello", max_tokens=8)
            assert _chat(server, "hello", max_tokens=8).choices[0].message.content == expected
            assert server.figure("llmfast_model_restarts") == restarts
        os.kill(_processes(server)[-1], signal.SIGSEGV)
        with contextlib.suppress(openai.APIError):
            _chat(server, "hello", max_tokens=8)
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
            assert server.figure("llmfast_model_restarts") == restarts
        assert any("the model failed: " in line for line in server.lines)
        assert "Traceback" not in "".join(server.lines)


class _Failing:
    """A worker whose first turn fails, in the place of one that runs a model."""

    def __init__(self, failures: "list[Exception]") -> None:
        self._failures = failures
        self._sent: list[Any] = []

    def call(self, method: str, *arguments: Any) -> Any:
        self.send(method, *arguments)
        return self.receive()

    def send(self, *call: Any) -> None:
        self._sent.append(call)

    def receive(self) -> Any:
        method, *arguments = self._sent.pop(0)
        if method == "describe":
            return Facts("fake", "text-generation", 2, 10, "")
        if self._failures:
            raise self._failures.pop()
        return [Event(number, "x", Generation("x", 1, 1, 0.1, None, "eos")) for number, _ in arguments[0]]

    def close(self) -> None:
        pass


def test_a_turn_that_fails_is_told_to_those_in_it_and_the_next_one_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_BACKOFF_S", 0.001)
    failures: list[Exception] = [RuntimeError("Traceback\nonnxruntime: out of bounds")]

    async def ask() -> None:
        scheduler = scheduler_module.Scheduler(lambda: _Failing(failures), 9, 9)  # type: ignore[arg-type,return-value]
        for _ in range(3):
            hit = scheduler.submit({})
            turns = asyncio.create_task(scheduler.run())
            with pytest.raises(NativeCrashError, match="the model failed: onnxruntime: out of bounds"):
                await asyncio.wait_for(hit.next(), 10)
            answered = await asyncio.wait_for(scheduler.submit({}).next(), 10)
            assert answered.generation is not None
            turns.cancel()
            failures.append(RuntimeError("Traceback\nonnxruntime: out of bounds"))
        assert len(scheduler.restarts) == 3
        scheduler.close()

    asyncio.run(ask())


def test_sigterm_lets_answers_end(bundle: Path) -> None:
    with serving(bundle) as server:
        pieces = []
        for chunk in _chat(server, "hello", max_tokens=300, stream=True):
            if not pieces:
                server.process.send_signal(signal.SIGTERM)
            pieces.append(chunk.choices[0].delta.content or "")
        assert "".join(pieces) == _expected(bundle, "hello", 300)
        assert server.process.wait(30) == 143
        assert "Traceback" not in "".join(server.lines)


def test_every_route_but_health_wants_the_key(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, LLMFAST_API_KEY="secret") as server:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        for path in ("/", "/page.js", "/metrics", "/v1/models", "/nope"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !"}):
                assert httpx.get(f"{server.url}{path}", headers=headers).status_code == 401
        assert httpx.post(f"{server.url}/v1/chat/completions", json={}).status_code == 401
        assert httpx.get(f"{server.url}/", auth=("anyone", "secret")).status_code == 200
        assert server.client(api_key="secret").models.list().data[0].id == "tiny"
        assert "secret" not in "".join(server.lines)


def _run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "llmfast", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def test_open_doors_and_taken_ports_are_refused(server: Server, bundle: Path, tmp_path: Path) -> None:
    opened = _run(str(bundle), "--host", "0.0.0.0")
    assert (opened.returncode, "LLMFAST_API_KEY" in opened.stderr) == (2, True)
    taken = _run(str(bundle), "--port", server.url.rpartition(":")[2])
    assert (taken.returncode, "is taken" in taken.stderr) == (8, True)
    (tmp_path / "key").write_text(" \n")
    empty = _run(str(bundle), "--api-key-file", str(tmp_path / "key"))
    assert (empty.returncode, "empty key" in empty.stderr) == (3, True)
    for length in ("1", "100000"):
        beyond = _run(str(bundle), "--port", "0", "--context-length", length)
        assert (beyond.returncode, "2 to 512" in beyond.stderr) == (2, True)
    missing = _run(str(tmp_path / "nothing"))
    assert (missing.returncode, "Traceback" in missing.stderr) == (3, False)


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
        with pytest.raises(openai.NotFoundError, match="feature-extraction"):
            _chat(server, "x")
        os.kill(_processes(server)[-1], signal.SIGSEGV)
        with ThreadPoolExecutor(6) as pool:  # one meets the crash, the others wait until the model is there again
            asked = lambda _: httpx.post(f"{server.url}/v1/embeddings", json={"input": texts}, timeout=60)  # noqa: E731
            codes = sorted(answer.status_code for answer in pool.map(asked, range(6)))
        assert codes == [200] * 5 + [500]
        assert server.figure("llmfast_model_restarts") == 1
        server.wait_for("llmfast_requests_active", 0)
        for _ in range(3):
            os.kill(_processes(server)[-1], signal.SIGSEGV)
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
    assert shown == ["hello", _expected(bundle, "hello", 400)]
    assert browser.find_element(By.ID, "model").text == "tiny"
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []
