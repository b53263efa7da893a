"""A sweep of bundles over the nodes of a Ray cluster: on each node a run with the baseline and a share of the others.

Nodes differ, and two that are alike differ too, so nothing is compared across them: ratios, changes and verdicts are
those of the run on one node. A run has all processors that its node gives to Ray, and, where its providers need GPUs,
all of these too.
"""

import contextlib
import io
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmfast import report
from llmfast.bench.contestant import line_up, name_models
from llmfast.bench.document import hash_model
from llmfast.bench.options import BenchOptions
from llmfast.bench.result import Benchmark, Row
from llmfast.bench.stage import bench
from llmfast.cluster import (
    SHUTDOWN_S,
    connect,
    find_cluster,
    gpus,
    inherited,
    living_nodes,
    needs_gpu,
    processors,
)
from llmfast.errors import InputError, LlmfastError, NativeCrashError, OptionError, UnsupportedError
from llmfast.supervisor import GRACE_S, ask_for_grace
from llmfast.verdict import Judgement


def bench_on_cluster(
    models: Sequence[Path],
    options: BenchOptions,
    baseline: Path | None = None,
    address: str | None = None,
    workers: int | None = None,
) -> Benchmark:
    """Measure bundles as `bench` does, each on one node of a cluster, beside the baseline.

    Args:
        models: bundle directories or .onnx files, at the same places on all nodes; so is what `options` names.
        options: of each run.
        baseline: the bundle the others are compared with; None takes the first model.
        address: of the cluster; None is RAY_ADDRESS, or else a new one of this machine alone.
        workers: nodes that take part, at most; None takes all.

    Returns:
        What `bench` does. Each row has the name of the node that it comes from; the baseline has one for each node.

    Raises:
        InputError: a node has other models.
        NativeCrashError: the node of a run died, and no other is left.
        UnsupportedError: Ray is not installed, there is no cluster, or none of its nodes has processors.
        LlmfastError: as `bench` raises it.
    """
    if workers is not None and workers < 1:
        raise OptionError(f"--workers {workers}: must be at least 1")
    named = {label: path.resolve() for label, path in name_models(models, baseline).items()}
    contestants, reference = line_up(named, baseline, options)
    first = next(label for label, path in named.items() if path == reference.path)
    others = [label for label in named if label != first]
    files = {name: found.resolve() for name in ("data", "tasks_dir") if (found := getattr(options, name)) is not None}
    ask_for_grace(SHUTDOWN_S + GRACE_S)
    ray = connect(find_cluster(address))
    try:
        nodes = sorted(living_nodes(ray), key=lambda node: (node["NodeManagerHostname"], node["NodeID"]))
        nodes = [node for node in nodes if processors(node)][:workers]
        if not nodes:
            raise UnsupportedError("no node of the cluster gives processors to Ray", "start nodes with --num-cpus")
        count = max(1, min(len(nodes), len(others)))
        shares = [[first, *others[start::count]] for start in range(count)]
        groups = [{label: named[label] for label in share} for share in shares]
        found = _run(ray, nodes, groups, replace(options, **files))
    finally:
        ray.shutdown()
    return _merge(found, {one.label: hash_model(one.bundle) for one in contestants})


def measure(models: Mapping[str, Path], options: BenchOptions) -> tuple[Benchmark, str]:
    """Run `bench` where this is called, the first model being the baseline; return what it gives, and its notes."""
    with contextlib.redirect_stderr(io.StringIO()) as notes:
        found = bench(models, options)
    return found, notes.getvalue()


def _run(
    ray: Any, nodes: Sequence[dict[str, Any]], groups: Sequence[Mapping[str, Path]], options: BenchOptions
) -> dict[str, Benchmark]:
    """Return what was measured of each group by the name of the node; a group whose node died goes to another one."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    waiting, free = deque(groups), deque(nodes)
    running: dict[Any, tuple[str, dict[str, Any], Mapping[str, Path]]] = {}
    hosts: list[str] = []  # of the runs, as they were started
    names: list[str] = []
    done: dict[str, Benchmark] = {}
    with report.progress("bench", total=len(groups)) as advance:
        while waiting or running:
            while waiting and free:
                node, group = free.popleft(), waiting.popleft()
                host = node["NodeManagerHostname"]
                hosts.append(host)
                name = host if hosts.count(host) == 1 else f"{host} ({hosts.count(host)})"
                names.append(name)
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                settings = {"num_cpus": processors(node), "scheduling_strategy": where, "max_retries": 0} | inherited()
                if any(needs_gpu(provider) for provider in options.providers):
                    settings["num_gpus"] = gpus(node)
                task = ray.remote(measure).options(**settings)
                running[task.remote(group, options)] = name, node, group
                report.note(f"{name}: {', '.join(group)}")
            (ready,), _ = ray.wait(list(running), num_returns=1)
            name, node, group = running.pop(ready)
            try:
                done[name], notes = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, LlmfastError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                if not free and not running:
                    raise NativeCrashError(f"the run on `{name}` died, and no other node is left") from error
                report.note(f"note: the run on `{name}` died: another node measures {', '.join(group)}")
                waiting.append(group)
            else:
                for line in notes.splitlines():
                    report.note(f"{name}: {line}")
                free.append(node)
                advance()
    return dict(sorted(done.items(), key=lambda pair: names.index(pair[0])))


def _merge(found: Mapping[str, Benchmark], models: Mapping[str, Mapping[str, str]]) -> Benchmark:
    """Return the runs of all nodes as one.

    Args:
        found: by the node's name.
        models: label -> hashes of the model's files here.

    Raises:
        InputError: a node has measured another model.
    """
    rows: list[Row] = []
    verdict: list[Judgement] = []
    warnings: list[str] = []
    for name, one in found.items():
        for row in one.rows:
            if row.model_sha256 != models[row.bundle]:
                raise InputError(f"`{row.bundle}` is another model on `{name}` than here", "copy it there again")
            rows.append(replace(row, node=name, processor=one.machine["cpu"]))
        verdict += one.verdict
        warnings += [f"{name}: {warning}" for warning in one.warnings]
    first = next(iter(found.values()))
    settings = {**first.settings, "rounds": min(one.settings["rounds"] for one in found.values())}
    nodes = {name: one.machine for name, one in found.items()}
    return replace(first, settings=settings, warnings=warnings, rows=rows, verdict=verdict, nodes=nodes)
