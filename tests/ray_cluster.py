"""A Ray cluster on this machine, for tests."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any


class Asked(Exception):
    """What was asked of Ray for a process."""


class Asking:
    """Stands in for Ray: one machine of two processors and some GPUs; who asks for a process there gets `Asked`."""

    def __init__(self, gpus: int) -> None:
        self._resources = {"CPU": 2.0} | ({"GPU": float(gpus)} if gpus else {})

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": "0" * 56, "NodeManagerHostname": "one", "Resources": self._resources}]

    def remote(self, _: object) -> "Asking":
        return self

    def options(self, **settings: Any) -> None:
        raise Asked(settings)

    def shutdown(self) -> None:
        pass


class Cluster:
    """Two nodes of one processor each, on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        node = {"num_cpus": 1, "object_store_memory": 1 << 27}
        self._cluster = RayCluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        self._second = self._cluster.add_node(**node)
        self.address = self._cluster.address

    def kill_second(self) -> None:
        """Kill a node as a machine dies, with all its processes: workers would see only after a second."""
        raylet = self._second.all_processes["raylet"][0].process.pid
        threads = Path(f"/proc/{raylet}/task").iterdir()
        workers = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
        self._cluster.remove_node(self._second, allow_graceful=False)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    def close(self) -> None:
        self._cluster.shutdown()
