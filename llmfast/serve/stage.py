"""The serve command: a bundle, a port, and requests until somebody ends it."""

import asyncio
import errno
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

from llmfast.errors import LlmfastError, OptionError, OutputExistsError, ResourceError, UnsupportedError
from llmfast.report import note
from llmfast.serve.options import ServeOptions
from llmfast.supervisor import GRACE_S, Echo, ask_for_grace
from llmfast.worker import Worker

__all__ = ["ServeOptions", "serve"]

_KEEP_ALIVE_S = 15
_BACKLOG = 2048
# A client that reads nothing for so long is gone.
_WRITE_STALL_S = 30


def serve(model: Path, options: ServeOptions) -> None:
    """Serve a bundle until a signal ends it; requests under way are answered first.

    Args:
        model: bundle directory.
        options: see `ServeOptions`.

    Raises:
        OptionError: a host that is not known, or a port that can't be.
        OutputExistsError: the port is taken.
        UnsupportedError: the extra `serve` is not installed, or the model has a task that can't be served.
        NativeCrashError: the model's process died again and again.
        ResourceError: the KV cache does not fit the memory.
    """
    try:
        import uvicorn

        from llmfast.serve.app import Limits, make_app
        from llmfast.serve.connection import Connection
    except ImportError as error:
        raise UnsupportedError(
            f"serving needs `{error.name}`, which is not installed", "pip install 'llmfast[serve]'"
        ) from error
    from llmfast.serve.scheduler import Scheduler

    listening = _listen(options.host, options.port)
    arguments = (model, options.provider, options.threads, options.batch_size, options.context_length)
    scheduler = Scheduler(
        partial(Worker, "llmfast.serve.model:ServedModel", *arguments), options.queue_size, options.queue_timeout_s
    )
    limits = Limits(options.body_bytes, options.max_tokens, options.timeout_s)
    config = uvicorn.Config(
        make_app(scheduler, options.host, options.key, limits),
        log_level="critical",
        access_log=False,
        server_header=False,
        http=Connection,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(options.drain_s)),
        h11_max_incomplete_event_size=1 << 16,
    )
    server = _make_server(config)
    ask_for_grace(options.drain_s + GRACE_S)
    scheduler.give_up = lambda: setattr(server, "should_exit", True)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    note(f"serving `{scheduler.facts.name}` on http://{shown}:{port} ({scheduler.facts.description}); Ctrl-C ends it")
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        scheduler.close()
        listening.close()
    if scheduler.failure is not None:
        raise scheduler.failure


def _make_server(config: Any) -> Any:
    import uvicorn

    echo = Echo()

    class Server(uvicorn.Server):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: Any) -> None:
            """End when the requests under way have been answered; at once at the second signal."""
            if echo.hears():
                return
            self.force_exit = self.should_exit
            if not self.should_exit:
                note(f"{signal.Signals(sig).name}: answering the requests under way; a second one ends them")
            super().handle_exit(sig, frame)

    return Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _WRITE_STALL_S * 1000)
    try:
        listening.bind((host, port))
        listening.listen(_BACKLOG)  # who reads the address that is printed next may come at once
    except (OverflowError, UnicodeError, OSError) as error:
        listening.close()
        raise _explained(error, host, port) from error
    return listening


def _explained(error: Exception, host: str, port: int) -> LlmfastError:
    """Return why the server can't listen."""
    if isinstance(error, OverflowError):
        return OptionError(f"--port {port}: must be 0 to 65535")
    if isinstance(error, (UnicodeError, socket.gaierror)):
        return OptionError(f"--host {host}: no address of this name is known", "give an address of this machine")
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return OutputExistsError(f"port {port} on {host} is taken", "choose another: --port")
    reason = getattr(error, "strerror", None) or error
    return ResourceError(f"cannot listen on {host}, port {port}: {reason}")
