"""`llmfast export --module`: a PyTorch module from a user's own file becomes a bundle, its parity proven.

The file is run, because its user named it, in a worker process: whatever it prints goes to stderr, and a crash in it
is contained. Nothing else is run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfast import registry
from llmfast.bundle import (
    MODEL,
    SEQ2SEQ_TASKS,
    TEXT_GENERATION,
    UNKNOWN_TASK,
    Manifest,
    ModelBundle,
    check_output,
    sha256,
    stage_output,
    write_manifest,
)
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.export.requirements import require_export_extra
from llmfast.export.stage import ExportOptions, make_step
from llmfast.graph.model import OnnxModel, count_parameters
from llmfast.lineage import read_lineage
from llmfast.report import note, progress
from llmfast.worker import Worker

# What encoders are fed with by the commands that know their task.
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class TracedModule:
    """What the worker wrote and found out.

    Attributes:
        kind: the module's class.
        inputs: names, in the graph's order.
        outputs: names.
        examples: input -> `dtype`, `shape`, `low`, `high` of the example.
        dynamic_axes: input -> axis -> name.
        dimensions: name -> (smallest, largest or None).
        parity: see `prove_module`.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: dict[str, dict[str, Any]]
    dynamic_axes: dict[str, dict[int, str]]
    dimensions: dict[str, tuple[int, int | None]]
    parity: dict[str, Any]


class ModuleTracer:
    """Runs a user's file; lives in a worker process.

    Args:
        path: a Python file.
        factory: a function of it.
        weights: a .safetensors file, or None.
        threads: threads for PyTorch and ONNX Runtime.
    """

    def __init__(self, path: Path, factory: str, weights: Path | None, threads: int | None) -> None:
        import torch

        from llmfast.export.user_module import load_user_module
        from llmfast.runtime import resolve_threads

        sys.dont_write_bytecode = True  # nothing but the bundle is written, also not beside the user's file
        torch.set_num_threads(resolve_threads(threads))
        self._threads = threads
        self._user = load_user_module(path, factory, weights)

    def write(self, staged: Path) -> TracedModule:
        """Write model.onnx and prove that it computes what the module does."""
        from llmfast.export.module_parity import prove_module
        from llmfast.export.module_trace import describe_inputs, trace_module

        user = self._user
        axes, outputs = trace_module(user, staged)
        return TracedModule(
            kind=type(user.module).__name__,
            inputs=tuple(user.inputs),
            outputs=outputs,
            examples=describe_inputs(user.inputs),
            dynamic_axes={name: dict(named) for name, named in axes.names.items()},
            dimensions={name: (size.smallest, size.largest) for name, size in axes.dimensions.items()},
            parity=prove_module(user, staged / MODEL, axes, self._threads),
        )


def export_module(module: str, output: Path, options: ExportOptions, weights: Path | None = None) -> ModelBundle:
    """Export a module that a user's own file makes.

    Args:
        module: `path/to/file.py:factory`; `factory()` returns `(module, example_inputs)` or `(module, example_inputs,
            dynamic_axes)`. The file is run.
        output: the bundle's directory.
        options: see `ExportOptions`; without a task the bundle's is `unknown`.
        weights: a .safetensors file with the module's state dict.

    Raises:
        OptionError: not `file.py:factory`, or an unknown task.
        InputError: the file, its factory, the example inputs or the weights are not what they should be.
        UnsafeInputError: the weights are a pickle.
        UnsupportedError: the module can't be traced, or its outputs are not the task's.
        GateError: ONNX Runtime and PyTorch disagree; nothing is written.
        OutputExistsError: the output exists.
    """
    path, factory = _prepare(module, output, options)
    with stage_output(output, options.overwrite) as staged:
        with (
            progress("tracing and comparing with PyTorch"),
            Worker("llmfast.export.module:ModuleTracer", path, factory, weights, options.threads) as worker,
        ):
            traced: TracedModule = worker.call("write", staged)
        task = options.task or UNKNOWN_TASK
        if options.task:
            _check_task(options.task, traced)
        if not traced.dynamic_axes:
            note("note: every axis is as long as in the examples; return dynamic axes as a third value to free some")
        before = read_lineage(weights.parent) if weights else ()  # weights that llmfast trained have steps
        manifest = Manifest(
            task=task,
            source={"id": f"{path.name}:{factory}", "revision": None, "sha256": _hashes(path, weights)},
            architecture=_describe(traced, task, OnnxModel.load(staged / MODEL)),
            graphs={"model": {"file": MODEL, "inputs": list(traced.inputs), "outputs": list(traced.outputs)}},
            lineage=(*before, make_step("module", options, **_choices(path, factory, weights))),
            measured={"export": {"parity": traced.parity}},
        )
        write_manifest(staged, manifest)
    return ModelBundle.open(output)


def describe_module_export(module: str, output: Path, options: ExportOptions) -> str:
    """Check what can be checked without running the user's file, and say in one line what `export_module` would do."""
    path, factory = _prepare(module, output, options)
    if not path.is_file():
        raise InputError(f"not found: `{path}`", "--module takes FILE.py:FUNCTION")
    return f"would run `{path}` and trace what `{factory}()` makes into `{output}`"


def _prepare(module: str, output: Path, options: ExportOptions) -> tuple[Path, str]:
    """Check what can be checked before the file is run; return it and the factory's name."""
    file, _, factory = module.rpartition(":")
    if not file or not factory.isidentifier():
        raise OptionError(f"--module `{module}`: not FILE.py:FUNCTION", "for example --module models.py:factory")
    path = Path(file)
    check_output(output, (path,), options.overwrite)
    require_export_extra()
    if options.task and options.task not in registry.names("tasks"):
        raise registry.unknown_name("task", options.task, registry.names("tasks"))
    return path, factory


def _check_task(task: str, traced: TracedModule) -> None:
    """Refuse a task whose commands could not feed or read this graph."""
    plugin = registry.load("tasks", task)
    if hasattr(plugin, "INPUT"):
        raise UnsupportedError(f"a module can't be exported for {task}", "leave out --task")
    wanted = plugin.OUTPUTS
    missing = [name for name in wanted if name not in traced.outputs]
    foreign = [name for name in traced.inputs if name not in _TEXT_INPUTS]
    if task in (TEXT_GENERATION, *SEQ2SEQ_TASKS) or missing or foreign:
        reason = f"it has no output `{missing[0]}`" if missing else "it keeps no cache"
        reason = f"it has an input `{foreign[0]}`" if foreign and not missing else reason
        raise UnsupportedError(
            f"`{traced.kind}` can't be exported for {task}: {reason}",
            f"inputs {', '.join(_TEXT_INPUTS)}; outputs {', '.join(wanted)}; or leave out --task",
        )
    for name in traced.inputs:
        if set(traced.dynamic_axes.get(name, ())) != {0, 1}:
            raise UnsupportedError(
                f"`{traced.kind}` can't be exported for {task}: batch and length of `{name}` are not dynamic",
                f'dynamic_axes = {{"{name}": {{0: "batch", 1: "length"}}, ...}}',
            )


def _describe(traced: TracedModule, task: str, graph: OnnxModel) -> dict[str, Any]:
    """Return the manifest's architecture; what the commands of a task ask for comes on top."""
    described = {
        "class": traced.kind,
        "num_parameters": count_parameters([graph]),
        "example_inputs": traced.examples,
        "dynamic_axes": {
            name: {str(axis): own for axis, own in axes.items()} for name, axes in traced.dynamic_axes.items()
        },
        "dimensions": {name: list(bounds) for name, bounds in traced.dimensions.items()},
    }
    if task == UNKNOWN_TASK:
        return described
    _, longest = traced.dimensions[traced.dynamic_axes["input_ids"][1]]
    tables = [
        node.input[0] for node in graph.proto.graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"
    ]
    sizes = [graph.initializers[name].dims[0] for name in tables if name in graph.initializers]
    described |= {"context_length": longest} if longest else {}
    return described | ({"vocab_size": sizes[0]} if sizes else {})


def _choices(path: Path, factory: str, weights: Path | None) -> dict[str, Any]:
    return {"module": f"{path.name}:{factory}", "weights": weights.name if weights else None}


def _hashes(*files: Path | None) -> dict[str, str]:
    return {file.name: sha256(file) for file in files if file is not None}
