"""A cluster of Ray: what `infer` and `bench` share of it. Ray is imported when somebody asks for it."""

import logging
import os
import signal
from collections.abc import Sequence
from typing import Any

from llmfast.errors import LlmfastError, UnsupportedError
from llmfast.files import ALLOW_HARDLINKS
from llmfast.resources import FORCE
from llmfast.tuned import IGNORE

# Seconds that Ray takes to end.
SHUTDOWN_S = 10.0
# Providers whose devices Ray counts, and hides from who has not asked for them.
_ON_GPU = ("cuda", "tensorrt")
_INHERITED = (FORCE, ALLOW_HARDLINKS, IGNORE)


def find_cluster(address: str | None) -> str | None:
    """Return the address that was given, or else RAY_ADDRESS; None where there is neither."""
    return address or os.environ.get("RAY_ADDRESS")


def connect(address: str | None) -> Any:
    """Connect with a cluster, or start one on this machine; return Ray. It reports nothing to its makers.

    Args:
        address: of the cluster; None starts one, which ends with `ray.shutdown`.

    Raises:
        UnsupportedError: Ray is not installed, or there is no cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise need_ray(error) from error

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    own: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UnsupportedError(f"no Ray cluster at `{address or 'local'}`: {error}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ray


def processors(node: dict[str, Any]) -> int:
    """Return how many processors a node of `ray.nodes()` gives to Ray."""
    return int(node["Resources"].get("CPU", 0))


def gpus(node: dict[str, Any]) -> int:
    """Return how many GPUs a node of `ray.nodes()` gives to Ray."""
    return int(node["Resources"].get("GPU", 0))


def needs_gpu(provider: str) -> bool:
    """Return whether a provider, the first of several that are tried in their order, needs a GPU that Ray gives."""
    return provider.partition(",")[0] in _ON_GPU


def living_nodes(ray: Any) -> Sequence[dict[str, Any]]:
    """Return the nodes of a cluster that are there, each as `ray.nodes()` describes it."""
    return [node for node in ray.nodes() if node["Alive"]]


def inherited() -> dict[str, Any]:
    """Return options of Ray's that hand what `llmfast --force` and the like have set to processes on other machines."""
    found = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {"runtime_env": {"env_vars": found}} if found else {}


def need_ray(error: ImportError) -> LlmfastError:
    """Return what to say where the extra is not installed."""
    return UnsupportedError(f"--engine ray needs `{error.name}`, which is not installed", "pip install 'llmfast[ray]'")
