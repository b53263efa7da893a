"""Who may ask, and how much: before a request reaches a route.

A server on this machine alone is reached by any web page that the user opens, if it answers to foreign names (DNS
rebinding) or foreign origins; so it answers to neither.
"""

import base64
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import SplitResult, urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmfast.report import note, printable
from llmfast.serve.options import LOOPBACK
from llmfast.serve.protocol import RefusedError

OPEN_PATHS = ("/health",)


class Gate:
    """Checks host, origin and key, limits bodies, and notes every request in one line.

    Args:
        app: what comes behind.
        host: what the server listens on.
        key: what requests must carry as `Authorization: Bearer KEY`; None asks for none.
        most_bytes: of a body.
        count: told method, path, status and seconds of every request.
        quiet: note nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        key: str | None,
        most_bytes: int,
        count: Callable[[str, int, float], None],
        quiet: bool = False,
    ) -> None:
        self._app, self._key, self._most_bytes, self._count = app, key, most_bytes, count
        self._names = None if key is not None and host not in LOOPBACK else {*LOOPBACK, host}
        self._quiet = quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._limited(receive), watch)
        except RefusedError as refusal:
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, watch)
        finally:
            seconds = time.perf_counter() - start
            self._count(scope["path"], status, seconds)
            if not self._quiet and scope["path"] not in OPEN_PATHS:
                note(f"{scope['method']} {printable(scope['path'][:100])} {status} {seconds * 1e3:.0f} ms")

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._names is not None and (_split(f"//{host}").hostname or "") not in self._names:
            raise RefusedError(403, "this server does not answer to that name", kind="permission_error")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            raise RefusedError(403, "this server does not answer to other origins", kind="permission_error")
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers)
        if headers.get("content-encoding", "identity") != "identity":
            raise RefusedError(415, "compressed bodies are not taken")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most_bytes:
            raise self._too_large()

    def _check_key(self, headers: Mapping[str, str]) -> None:
        """Refuse who does not know the key; programs send it as a bearer token, browsers as a password."""
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
            except ValueError:
                given = ""
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self._key.encode("utf-8")):
            challenge = {"www-authenticate": 'Bearer, Basic realm="llmfast"'}
            raise RefusedError(401, "wrong or missing key", kind="authentication_error", headers=challenge)

    def _limited(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"body over {self._most_bytes} bytes")


def _split(address: str) -> SplitResult:
    """Return the parts of an address; what is none has no part."""
    try:
        return urlsplit(address)
    except ValueError:  # a bracket without its other half, say
        return urlsplit("")
