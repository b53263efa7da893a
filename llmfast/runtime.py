"""ONNX Runtime sessions: provider, threads, and the proof of where the nodes run."""

import importlib.util
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmfast import registry
from llmfast.bundle import PREFILL, ModelBundle
from llmfast.errors import InputError, LlmfastError, OptionError, ResourceError, UnsupportedError
from llmfast.graph.model import check_file
from llmfast.kept import kept
from llmfast.processor import saturates_int8
from llmfast.report import note
from llmfast.resources import require_memory
from llmfast.supervisor import tell_doing

if TYPE_CHECKING:
    import onnxruntime

_REGISTERED: set[str] = set()  # packages whose plugin library this process has loaded
_PROFILE: ContextVar[Path | None] = ContextVar("profile", default=None)
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, capped by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()[:2]
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2, or no quota (`max`)
    return max(1, cores)


def resolve_threads(threads: int | None) -> int:
    """Return the thread count to use.

    Raises:
        OptionError: not positive, or absurdly large.
    """
    if threads is None:
        return usable_cores()
    if not 1 <= threads <= 1024:
        raise OptionError(f"--threads {threads}: not between 1 and 1024")
    return threads


@kept
def open_session(
    model: Path,
    provider: str = "cpu",
    threads: int | None = None,
    spin: bool = True,
    graph: bytes | None = None,
    prepack: bool = True,
    rest: bool = False,
    block_base: int = 0,
) -> "onnxruntime.InferenceSession":
    """Open an ONNX Runtime session on the provider that was asked for, never silently on another.

    Args:
        model: the graph's path; external weights are read beside it.
        provider: a name in `llmfast.providers`; several, joined by commas, are tried in this order, and each
            that fails is noted.
        threads: intra-op threads; None takes the cores this process may use.
        spin: let idle threads spin, which helps latency and costs CPU time.
        graph: a serialized model to open in place of the file's, over the same external weights.
        prepack: copy weights into the order that the kernels like best. Without it weights stay in the mapped
            file, and its pages are all the memory that they take.
        rest: threads that spin stop when a run ends, for another session takes the next turn.
        block_base: of `session.dynamic_block_base`; 0 leaves it out.

    Raises:
        UnsupportedError: the provider is absent or took no node, or an operator has no kernel.
        InputError: ONNX Runtime can't read the model.
        ResourceError: its weights do not fit into memory.
        LlmfastError: a graph that is not shown to ONNX Runtime; see `llmfast.graph.guard`.
    """
    first, _, others = provider.partition(",")
    if others:
        try:
            return open_session(model, first, threads, spin, graph, prepack, rest, block_base)
        except UnsupportedError as error:
            note(f"note: {error.message}; going on with {others}")
            return open_session(model, others, threads, spin, graph, prepack, rest, block_base)
    ort = import_onnxruntime()
    plugin = registry.load("providers", provider)
    if not _is_unicode(model):
        raise UnsupportedError(f"ONNX Runtime can't open paths that are not UTF-8: `{model}`", "rename it")
    if graph is None:  # one in memory was checked when it was read
        weight_bytes = check_file(model)
        require_memory(weight_bytes if prepack else 0, f"`{model}`")
    options = ort.SessionOptions()
    options.intra_op_num_threads = resolve_threads(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1" if rest else "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if saturates_int8():
        # Products in 16 bits of uint8 weights, which don't saturate; nothing is done where the processor is better.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if block_base:
        options.add_session_config_entry("session.dynamic_block_base", str(block_base))
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if (profile := _PROFILE.get()) is not None:
        options.enable_profiling = True
        options.profile_file_prefix = f"{profile}-{model.stem}"
    if graph is not None:
        folder = str(model.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    providers = _take_devices(ort, plugin, options)
    tell_doing(f"opening `{model}` with ONNX Runtime, or running it")
    try:
        session = ort.InferenceSession(
            graph or str(model),
            options,
            providers=providers,
            disabled_optimizers=list(plugin.DISABLED_OPTIMIZERS),
            enable_fallback=0,
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise _translate(error, model) from error
    if session.get_providers()[0] != plugin.NAME or not placement(session).get(plugin.NAME):
        raise UnsupportedError(
            f"{plugin.NAME} runs no node of `{model}`: it fell back to {', '.join(placement(session))}",
            plugin.INSTALL,
        )
    return session


def _take_devices(ort: Any, plugin: ModuleType, options: Any) -> list[Any]:
    """Return the providers to open a session with; what a plugin library brings goes into the options instead.

    Plugins: https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/usage.html
    """
    package = getattr(plugin, "PLUGIN_PACKAGE", "")
    if not package:
        if plugin.NAME not in ort.get_available_providers():
            raise UnsupportedError(f"this ONNX Runtime has no {plugin.NAME}", plugin.INSTALL)
        return [(plugin.NAME, plugin.provider_options(0))]
    if importlib.util.find_spec(package) is None:
        raise UnsupportedError(f"{plugin.NAME} is not installed", plugin.INSTALL)
    if package not in _REGISTERED:  # once a process: a second time is an error of ONNX Runtime's
        try:
            ort.register_execution_provider_library(package, importlib.import_module(package).get_library_path())
        except Exception as error:
            raise UnsupportedError(f"{plugin.NAME} does not load: {_first_line(error)}", plugin.INSTALL) from error
        _REGISTERED.add(package)
    devices = [device for device in ort.get_ep_devices() if plugin.is_fit(device)]
    if not devices:
        raise UnsupportedError(f"{plugin.NAME} finds no device on this machine", plugin.NEEDS)
    options.add_provider_for_devices(devices[:1], plugin.provider_options(0))
    return []


def with_fallback(provider: str, allow_fallback: bool) -> str:
    """Return the providers to try: the one that was asked for, then the CPU's where that is allowed."""
    registry.load("providers", provider)
    return f"{provider},cpu" if allow_fallback and provider != "cpu" else provider


def suit_provider(bundle: ModelBundle, provider: str) -> str:
    """Return the providers for a bundle, without those that are known not to run it, or its number format slowly.

    Args:
        bundle: the model; what it was quantized to stands in its lineage.
        provider: as for `open_session`.

    Raises:
        UnsupportedError: no other provider is allowed; the hint names the better provider or format.
    """
    first, _, others = provider.partition(",")
    plugin = registry.load("providers", first)
    slow = [form for form in _number_formats(bundle) if form in plugin.SLOW]
    if first != "cpu" and {"encoder", "decoder"} <= bundle.graphs.keys():
        message, hint = f"provider `{first}` can't run encoder-decoders yet", "use --provider cpu"
    elif slow:
        scheme, activations = slow[0]
        message = f"`{bundle.name}` is {scheme} with {activations} activations, which {plugin.NAME} runs slowly"
        hint = plugin.SLOW[scheme, activations]
    else:
        return provider
    if not others:
        raise UnsupportedError(message, hint)
    note(f"note: {message}; going on with {others}")
    return suit_provider(bundle, others)


def _number_formats(bundle: ModelBundle) -> list[tuple[str, str]]:
    """Return (scheme, activations) of a bundle's graphs, as its lineage tells; none of a float model."""
    steps = [step for step in bundle.manifest.lineage if step.stage == "quantize"]
    if not steps:
        return []
    options = steps[-1].options
    second = options.get(PREFILL)
    described = [(steps[-1].method, options)]
    described += [(str(second.get("method", "")), second)] if isinstance(second, dict) else []
    formats = []
    for method, settings in described:
        scheme = method.partition(":")[0]
        chosen = settings.get(scheme)
        formats.append((scheme, chosen.get("activations", "") if isinstance(chosen, dict) else ""))
    return formats


@contextmanager
def profiled(prefix: Path | None) -> Iterator[None]:
    """Let every session that the body opens write ONNX Runtime's JSON profile.

    Args:
        prefix: of the profiles' names; None writes none.
    """
    token = _PROFILE.set(prefix)
    try:
        yield
    finally:
        _PROFILE.reset(token)


def placement(*sessions: "onnxruntime.InferenceSession") -> dict[str, int]:
    """Return how many nodes of a model each execution provider runs, as ONNX Runtime reports it."""
    nodes: Counter[str] = Counter()
    for session in sessions:
        for part in session.get_provider_graph_assignment_info():
            nodes[part.ep_name] += len(part.get_nodes())
    return dict(nodes)


def import_onnxruntime() -> Any:
    """Import onnxruntime.

    Raises:
        UnsupportedError: it is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise UnsupportedError("onnxruntime is not installed", "pip install 'llmfast[cpu]' or 'llmfast[cuda]'")
    import onnxruntime

    return onnxruntime


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _translate(error: Exception, model: Path) -> LlmfastError:
    reason = _first_line(error)
    if type(error).__name__ in ("NotImplemented", "EPFail"):
        return UnsupportedError(f"ONNX Runtime can't run `{model}`: {reason}")
    if isinstance(error, MemoryError) or "bad allocation" in reason or "allocate" in reason.lower():
        return ResourceError(f"not enough memory to load `{model}`: {reason}")
    return InputError(f"ONNX Runtime can't load `{model}`: {reason}", "the file may be truncated; make it again")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
