"""How a bundle is served."""

from dataclasses import dataclass, field

from llmfast.errors import OptionError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """How a bundle is served.

    Attributes:
        host: address to listen on; another than this machine's own needs a key.
        port: 0 takes a free one.
        key: what requests must carry as `Authorization: Bearer KEY`.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        batch_size: requests answered at once; None chooses by the memory.
        context_length: tokens of a prompt with its answer; None takes the model's, up to 4096.
        max_tokens: most tokens of an answer.
        queue_size: requests that may wait; more are told to come back.
        queue_timeout_s: seconds that they may wait.
        timeout_s: seconds from a request to the end of its answer, at most.
        drain_s: seconds that requests under way may go on when the server is ended.
        body_bytes: the longest body of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    provider: str = "cpu"
    threads: int | None = None
    batch_size: int | None = None
    context_length: int | None = None
    max_tokens: int = 1024
    queue_size: int = 64
    queue_timeout_s: float = 30.0
    timeout_s: float = 300.0
    drain_s: float = 30.0
    body_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.key:
            raise OptionError(
                f"--host {self.host} is open to others, and there is no key",
                "set the environment variable LLMFAST_API_KEY, or give --api-key-file FILE",
            )
        for name in ("max_tokens", "queue_size", "queue_timeout_s", "timeout_s", "body_bytes"):
            if getattr(self, name) <= 0:
                raise OptionError(
                    f"--{name.removesuffix('_s').replace('_', '-')} {getattr(self, name)}: must be above 0"
                )
