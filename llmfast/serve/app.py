"""The routes of the server."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmfast.bundle import TEXT_GENERATION
from llmfast.errors import LlmfastError, NativeCrashError, ResourceError
from llmfast.infer.batch import Event
from llmfast.infer.generate import Generation
from llmfast.serve.gate import Gate
from llmfast.serve.model import FEATURE_EXTRACTION
from llmfast.serve.protocol import RefusedError, Spelling, read_ask, read_texts, spell_vectors
from llmfast.serve.scheduler import BusyError, ClosedError, ExpiredError, Scheduler, Ticket

_PAGE = Path(__file__).with_name("page.html")
_BODY_TIMEOUT_S = 10.0

Made = TypeVar("Made")


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        body_bytes: of its JSON.
        max_tokens: of an answer.
        timeout_s: from the request to the end of the answer.
    """

    body_bytes: int = 1 << 20
    max_tokens: int = 1024
    timeout_s: float = 300.0


class Figures:
    """What Prometheus reads. A registry of its own, so that several servers can be in one process.

    Args:
        scheduler: says how many wait and are answered, and when the model is started again.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("llmfast_requests", "Requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("llmfast_request_seconds", "Request to answer", ["path"], registry=self.registry)
        self.prompt_tokens = Counter("llmfast_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.generated_tokens = Counter("llmfast_generated_tokens", "Tokens of answers", registry=self.registry)
        self.ttft = Histogram("llmfast_ttft_seconds", "Request to first token", registry=self.registry)
        restarts = Counter("llmfast_model_restarts", "Restarts of the model's process", registry=self.registry)
        scheduler.restarted = restarts.inc
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "llmfast_requests_waiting": ("Requests without a row", lambda: scheduler.waiting),
            "llmfast_requests_active": ("Requests being answered", lambda: scheduler.active),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(read)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request; paths that do not exist are counted as one."""
        known = path if path in {route.path for route in _ROUTES} else "other"
        self.requests.labels(known, str(status)).inc()
        self.seconds.labels(known).observe(seconds)

    def count_answer(self, generation: Generation, first_s: float) -> None:
        """Count an answer's tokens."""
        self.prompt_tokens.inc(generation.prompt_tokens)
        self.generated_tokens.inc(generation.generated_tokens)
        self.ttft.observe(first_s)


def make_app(
    scheduler: Scheduler, host: str, key: str | None = None, limits: Limits | None = None, quiet: bool = False
) -> ASGIApp:
    """Return the application.

    Args:
        scheduler: runs while the application does; is not closed with it.
        host: what the server listens on.
        key: what requests must carry; None asks for none.
        limits: of a request.
        quiet: write no line for each request.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        turns = asyncio.create_task(scheduler.run())
        turns.add_done_callback(scheduler.stopped)
        yield
        turns.cancel()

    limits = limits or Limits()
    app = Starlette(routes=_ROUTES, lifespan=lifespan, exception_handlers=_HANDLERS)
    app.state.scheduler, app.state.limits = scheduler, limits
    app.state.figures = Figures(scheduler)
    app.state.numbers = itertools.count(1)
    app.state.started = int(time.time())
    return Gate(app, host, key, limits.body_bytes, app.state.figures.count_request, quiet)


async def _page(request: Request) -> Response:
    policy = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
    return FileResponse(_PAGE, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})


async def _script(request: Request) -> Response:
    return FileResponse(_PAGE.with_name("page.js"), media_type="text/javascript")


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _metrics(request: Request) -> Response:
    return PlainTextResponse(generate_latest(request.app.state.figures.registry))


async def _models(request: Request) -> Response:
    state = request.app.state
    facts = state.scheduler.facts
    entry = {"id": facts.name, "object": "model", "created": state.started, "owned_by": "llmfast"}
    return JSONResponse({"object": "list", "data": [entry]})


async def _chat(request: Request) -> Response:
    return await _complete(request, is_chat=True)


async def _completions(request: Request) -> Response:
    return await _complete(request, is_chat=False)


async def _complete(request: Request, is_chat: bool) -> Response:
    state = request.app.state
    scheduler: Scheduler = state.scheduler
    body = await _read_body(request, scheduler, TEXT_GENERATION)
    ask = read_ask(body, is_chat, min(state.limits.max_tokens, scheduler.facts.capacity))
    answer = _Answer(
        request, scheduler, scheduler.submit(ask.fields, ask.stream), state.limits.timeout_s, state.figures
    )
    spelling = Spelling(scheduler.facts.name, ask, next(state.numbers))
    # The status is decided by the first token: a request that is refused has none.
    event = await answer.next()
    if ask.stream:
        return _Stream(answer, _events(answer, spelling, event))
    while event.generation is None:
        event = await answer.next()
    return JSONResponse(spelling.whole(event.generation))


async def _embeddings(request: Request) -> Response:
    state = request.app.state
    body = await _read_body(request, state.scheduler, FEATURE_EXTRACTION)
    texts, as_base64 = read_texts(body)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        vectors, tokens = await _wait(state.scheduler.embed(texts), gone, time.monotonic() + state.limits.timeout_s)
    finally:
        gone.cancel()
    state.figures.prompt_tokens.inc(tokens)
    return JSONResponse(spell_vectors(state.scheduler.facts.name, vectors, tokens, as_base64))


class _Answer:
    """The events of a request, until it is answered, takes too long, or nobody listens; then its row is free.

    What ends it comes through the ticket's queue as events do: a token costs one wake-up, and no task or timer.
    """

    def __init__(
        self, request: Request, scheduler: Scheduler, ticket: Ticket, timeout_s: float, figures: Figures
    ) -> None:
        self._scheduler, self._ticket, self._figures = scheduler, ticket, figures
        self._gone = asyncio.ensure_future(_disconnected(request))
        self._gone.add_done_callback(self._leave)
        late = RefusedError(504, "the answer took too long", kind="server_error")
        self._late = asyncio.get_running_loop().call_later(timeout_s, ticket.events.put_nowait, late)
        self._first_s = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether there is an event to return without waiting."""
        return not self._ticket.events.empty()

    async def next(self) -> Event:
        """Return the next event; after the last one there is none."""
        try:
            found = await self._ticket.next()
        except BaseException:
            self.close()
            raise
        self._first_s = self._first_s or time.monotonic() - self._ticket.submitted
        if found.generation is not None:
            self._figures.count_answer(found.generation, self._first_s)
            self.close()
        return found

    def close(self) -> None:
        """Wait no longer."""
        self._scheduler.cancel(self._ticket)
        self._late.cancel()
        self._gone.cancel()

    def _leave(self, gone: "asyncio.Future[None]") -> None:
        if not gone.cancelled():
            self._scheduler.cancel(self._ticket)
            self._ticket.events.put_nowait(ClientDisconnect())


class _Stream(StreamingResponse):  # type: ignore[misc]
    """Pieces of an answer. A client may leave before the first one, when nothing has asked the iterator yet."""

    def __init__(self, answer: _Answer, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces, and free the answer's row however that ends."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _events(answer: _Answer, spelling: Spelling, event: Event) -> AsyncIterator[str]:
    """Yield server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html

    What is ready is sent at once, one event for each token all the same.
    """
    lines = "".join(map(_line, spelling.first()))
    try:
        while True:
            if event.text:
                lines += _line(spelling.piece(event.text))
            if event.generation is not None:
                break
            if lines and not answer.is_ready:
                yield lines
                lines = ""
            event = await answer.next()
        yield lines + "".join(map(_line, spelling.last(event.generation)))
    except ClientDisconnect:
        return
    except Exception as error:  # the status has been sent: what is wrong can only be said here
        yield lines + _line(_refusal(error).body())
    yield "data: [DONE]\n\n"


def _line(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


async def _wait(work: Coroutine[Any, Any, Made], gone: "asyncio.Future[None]", deadline: float) -> Made:
    """Return what a coroutine makes.

    Raises:
        ClientDisconnect: `gone` was done first.
        RefusedError: the deadline, monotonic seconds, came first.
    """
    task = asyncio.ensure_future(work)
    try:
        left = max(0.0, deadline - time.monotonic())
        waited: set[asyncio.Future[Any]] = {task, gone}
        await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ClientDisconnect
        if not task.done():
            raise RefusedError(504, "the answer took too long", kind="server_error")
        return task.result()
    finally:
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, scheduler: Scheduler, task: str) -> dict[str, Any]:
    """Return the JSON object of a request that fits the model.

    Raises:
        RefusedError: it does not.
    """
    facts = scheduler.facts
    if facts.task != task:
        raise RefusedError(404, f"`{facts.name}` is for {facts.task}, not for {task}")
    try:
        text = await asyncio.wait_for(request.body(), _BODY_TIMEOUT_S)
    except TimeoutError as error:
        raise RefusedError(408, "the body did not come") from error
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not JSON") from error
    if not isinstance(body, dict):
        raise RefusedError(422, "the body is not a JSON object")
    if body.get("model") not in (None, facts.name):
        raise RefusedError(404, f"there is no model `{str(body['model'])[:64]}`, there is `{facts.name}`", "model")
    return body


def _refusal(error: Exception) -> RefusedError:
    """Return what a client is told of a failure."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, BusyError):
        return RefusedError(429, "too many requests wait", kind="rate_limit_error", headers={"retry-after": "1"})
    if isinstance(error, ExpiredError):
        return RefusedError(503, "waited too long for a free row", kind="server_error", headers={"retry-after": "5"})
    if isinstance(error, ClosedError):
        return RefusedError(503, "the server is going down", kind="server_error", headers={"retry-after": "5"})
    if isinstance(error, HTTPException):
        return RefusedError(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, LlmfastError) and not isinstance(error, (NativeCrashError, ResourceError)):
        return RefusedError(400, error.message)
    return RefusedError(500, "the model failed", kind="server_error")


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it; the log does
    refusal = _refusal(error)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


_KINDS = (
    RefusedError, BusyError, ClosedError, ExpiredError, LlmfastError, ClientDisconnect, HTTPException,
)  # fmt: skip
_HANDLERS: Any = dict.fromkeys(_KINDS, _refuse)
_ROUTES = [
    Route("/", _page),
    Route("/page.js", _script),
    Route("/health", _health),
    Route("/metrics", _metrics),
    Route("/v1/models", _models),
    Route("/v1/chat/completions", _chat, methods=["POST"]),
    Route("/v1/completions", _completions, methods=["POST"]),
    Route("/v1/embeddings", _embeddings, methods=["POST"]),
]
