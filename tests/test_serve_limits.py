"""The server's limits: who may ask, how much, how long, and what clients that misbehave leave behind."""

import asyncio
import contextlib
import errno
import gzip
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmfast.errors import OptionError, OutputExistsError, ResourceError
from llmfast.serve import stage as serve_stage
from llmfast.serve.model import DEFAULT_ROWS, Facts, ServedModel
from llmfast.serve.scheduler import BusyError, Scheduler
from tests.serving import Server, chat, copy_with_template, processes, serving


@pytest.fixture(scope="module")
def bundle(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_template(fp32_bundle, tmp_path_factory.mktemp("served") / "tiny")


@pytest.mark.parametrize(("batch_size", "rows"), [(None, DEFAULT_ROWS), (40, 40)])
def test_as_many_requests_at_once_as_are_asked_for(bundle: Path, batch_size: int | None, rows: int) -> None:
    assert ServedModel(bundle, "cpu", 1, batch_size, 64).describe().rows == rows


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, "--batch-size", "4", "--max-tokens", "400") as running:
        yield running


class _Slow:
    """A worker that has vectors when it is let, in the place of one that runs a model."""

    def __init__(self) -> None:
        self.is_let = threading.Event()

    def call(self, method: str, *_: Any) -> Any:
        if method == "describe":
            return Facts("fake", "feature-extraction", 1, 10, "embeddings")
        assert self.is_let.wait(60)
        return [[0.0]], 1

    def close(self) -> None:
        pass


def test_texts_wait_until_it_is_their_turn() -> None:
    async def ask() -> None:
        worker = _Slow()
        scheduler = Scheduler(lambda: worker, 2, 60)  # type: ignore[arg-type,return-value]
        asked = [asyncio.create_task(scheduler.embed(["text"])) for _ in range(3)]

        async def begin() -> None:
            while (scheduler.active, scheduler.waiting) != (1, 2):
                await asyncio.sleep(0)

        await asyncio.wait_for(begin(), 10)
        with pytest.raises(BusyError):
            await scheduler.embed(["text"])
        worker.is_let.set()
        assert await asyncio.gather(*asked) == [([[0.0]], 1)] * 3
        assert (scheduler.active, scheduler.waiting) == (0, 0)
        scheduler.close()

    asyncio.run(ask())


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
        (b"{}", {"origin": "http://["}, 403),
        (b"{}", {"host": "["}, 403),
        (b'{"\\ud800": 1}', {}, 400),
        (b'{"model": "\\ud800"}', {}, 404),
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
        url, model = f"{server.url}/v1/completions", processes(server)[-1]
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
        for _ in range(20):  # on a busy machine it may have answered before it is stopped
            with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                os.kill(model, signal.SIGSTOP)
                *_, error, done = [line for line in lines if line]
            if "finish_reason" not in error:
                break
            os.kill(model, signal.SIGCONT)
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
        assert chat(server, "hello", max_tokens=4).usage.completion_tokens <= 4
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
        expected = chat(server, "hello", max_tokens=8).choices[0].message.content
        folder = Path(f"/proc/{processes(server)[1]}")
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
        assert chat(server, "hello", max_tokens=8).choices[0].message.content == expected


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


@pytest.mark.parametrize(
    ("failure", "kind", "reason"),
    [
        (OSError(48, "Address already in use"), OutputExistsError, "port 80 on nowhere is taken"),  # macOS's number
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), OptionError, "--host nowhere"),
        (OSError(errno.EACCES, "Permission denied"), ResourceError, "Permission denied"),
    ],
)
def test_where_it_can_not_listen_is_told(
    failure: OSError, kind: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(errno, "EADDRINUSE", 48)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(kind, match=reason):
        serve_stage._listen("nowhere", 80)


def test_a_name_that_none_can_have_is_no_host() -> None:
    with pytest.raises(OptionError, match=r"--host a\.\.b"):
        serve_stage._listen("a..b", 0)


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
