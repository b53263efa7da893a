"""`llmfast tune`: a PyTorch checkpoint learns from data, and becomes another one."""

import contextlib
import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import llmfast
from llmfast import registry
from llmfast.bundle import Step, check_output, sha256, stage_output
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.lineage import read_lineage, write_lineage
from llmfast.runtime import resolve_threads
from llmfast.tune.objective import Job, Objective
from llmfast.tune.options import TuneOptions

if TYPE_CHECKING:
    from llmfast.tune.parallel import Parallel

OBJECTIVES = "tune.objectives"
LOG, CURVES = "training.jsonl", "curves.svg"
_PACKAGES = ("torch", "transformers", "safetensors", "matplotlib")
_VERSIONED = ("torch", "transformers")
# What a result does not depend on, or is said by a hash.
_NOT_FACTS = ("resume", "overwrite", "threads", "log_every", "save_every", "data", "validation", "teacher", "weights")


@dataclass(frozen=True)
class Tuned:
    """What a run gave.

    Attributes:
        path: the new checkpoint.
        figures: `objective`, `precision`, `steps`, `parameters` and `trained_parameters`, `loss`, `tokens_per_s`,
            `peak_memory_bytes`, `skipped_steps`, and `validations`, the first one before any step.
        is_main: whether this process wrote it.
    """

    path: Path
    figures: dict[str, Any]
    is_main: bool


def tune(source: str | None, output: Path, options: TuneOptions) -> Tuned:
    """Train a checkpoint, or a module of the user's own.

    Args:
        source: a Hugging Face folder or a hub id; None with `options.module`.
        output: the new checkpoint's folder.
        options: see `TuneOptions`.

    Raises:
        OptionError: an option that can't be, or two that contradict each other.
        InputError: checkpoint, teacher or data are missing, malformed or do not fit; or --resume finds another run.
        UnsupportedError: the model has no such objective, the device no such precision, or a package is missing.
        GateError: the loss is no number any more.
        ResourceError: no room for a checkpoint; the last one is intact.
        OutputExistsError: the output exists, or an interrupted run's checkpoints do.
    """
    import torch

    from llmfast.tune.allocator import keep_freed_memory
    from llmfast.tune.fake_quantize import FakeQuantizer, parse_scheme
    from llmfast.tune.loop import Trainer
    from llmfast.tune.parallel import Parallel
    from llmfast.tune.precision import Precision, choose_precision
    from llmfast.tune.snapshots import Snapshots

    _require_packages(options)
    folder, plugin = _prepare(source, output, options)
    chosen = registry.make_options(plugin, options.settings)
    plan = parse_scheme(options.quantize_aware) if options.quantize_aware else None
    torch.set_num_threads(resolve_threads(options.threads))
    parallel = Parallel(options.device, options.parallel)
    options = _resolve(folder, options, plugin, choose_precision(options.precision, parallel.device), parallel)
    if parallel.device.type == "cpu":
        keep_freed_memory()
    facts = _facts(folder, options, chosen, parallel)
    snapshots = Snapshots(output, facts, options.resume, options.overwrite)
    with parallel.running(), tempfile.TemporaryDirectory() as companions, _quiet():
        parallel.wait()  # until all have looked at what is there
        torch.manual_seed(options.seed)  # of a new head, which all processes must have alike
        objective = _load(folder, plugin, chosen, options, Path(companions))
        objective.model.to(parallel.device)
        objective.to(parallel.device)
        torch.manual_seed(options.seed + parallel.rank)
        quantizer = FakeQuantizer(objective.model, plan) if plan else None
        precision = Precision(str(options.precision), parallel.device)
        if parallel.is_main and not options.resume:
            snapshots.begin()
        try:
            trainer = Trainer(objective, options, precision, parallel, snapshots, quantizer)
            if options.resume:
                trainer.resume()
            counts = _count(objective.model)
            trainer.run()
        except BaseException:
            if parallel.is_main and snapshots.last() is None:
                snapshots.discard()
            raise
        figures = {"objective": options.objective, "precision": options.precision, **counts, **trainer.figures()}
        _unwrap(objective, options, parallel)
        if parallel.is_main:
            with stage_output(output, options.overwrite) as staged:
                _write(objective, folder, staged, snapshots.log, options, facts, figures, Path(companions))
            snapshots.discard()
        parallel.wait()
    return Tuned(output, figures, parallel.is_main)


def describe_tuning(source: str | None, output: Path, options: TuneOptions) -> str:
    """Check what can be checked without training, and say in one line what `tune` would do."""
    from llmfast.tune.fake_quantize import parse_scheme

    _require_packages(options)
    folder, plugin = _prepare(source, output, options)
    chosen = registry.make_options(plugin, options.settings)
    if options.quantize_aware:
        parse_scheme(options.quantize_aware)  # refuses what can't be trained
    if options.module:
        return f"would run `{folder}` and train what it makes on `{options.data}` into `{output}`"
    from llmfast.tune.parallel import Parallel
    from llmfast.tune.precision import choose_precision

    parallel = Parallel(options.device, options.parallel)
    options = _resolve(folder, options, plugin, choose_precision(options.precision, parallel.device), parallel)
    with tempfile.TemporaryDirectory() as companions, _quiet():
        objective = _load(folder, plugin, chosen, options, Path(companions))
    counts = _count(objective.model)
    return (
        f"would train {counts['trained_parameters']:,} of {counts['parameters']:,} parameters of `{folder}` for "
        f"{_name(plugin)} in {options.precision}: {len(objective.train):,} rows in batches of {options.batch_size}, "
        f"{options.max_steps or f'{options.epochs} epochs'}{' steps' if options.max_steps else ''}; "
        f"{len(objective.validation):,} rows to validate on"
    )


def _require_packages(options: TuneOptions) -> None:
    for package in (*_PACKAGES, *(("peft",) if options.lora else ())):
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(
                f"tuning needs `{package}`, which is not installed", "pip install 'llmfast[export,tune]'"
            )


def _prepare(source: str | None, output: Path, options: TuneOptions) -> tuple[Path, ModuleType]:
    """Check output, input and options; return the checkpoint's folder or the module's file, and the objective."""
    if (source is None) == (options.module is None):
        raise OptionError(
            "tune needs a CHECKPOINT or --module, one of them", "llmfast tune CHECKPOINT -o DIR --data FILE"
        )
    if options.weights and not options.module:
        raise OptionError("--weights belongs to --module", "a CHECKPOINT brings its weights")
    if options.teacher and options.objective not in (None, "distillation"):
        raise OptionError(f"--teacher does not go with --objective {options.objective}", "leave one of the two out")
    for file in filter(None, (options.data, options.validation, options.weights)):
        if not file.is_file():
            raise InputError(f"not found: `{file}`", "give the path of a file")
    inputs = [options.data, *filter(None, (options.validation, options.weights))]
    inputs += [Path(one) for one in (source, options.teacher) if one]
    if not options.module:
        check_output(output, tuple(inputs), options.overwrite)
        from llmfast.tune.student import open_folder

        folder = open_folder(str(source))
        return folder, registry.load(OBJECTIVES, options.objective or _suitable(folder, options))
    path, _, function = options.module.rpartition(":")
    if not path or not function.isidentifier():
        raise OptionError(
            f"--module `{options.module}`: not FILE.py:FUNCTION", "for example --module models.py:factory"
        )
    for name in ("teacher", "lora", "gradient_checkpointing", "new_head", "labels"):
        if getattr(options, name):
            raise OptionError(f"--{name.replace('_', '-')} does not go with --module", "it is for checkpoints")
    if options.parallel == "fsdp":
        raise OptionError("--parallel fsdp does not go with --module", "use ddp")
    if options.objective not in (None, "tensors"):
        raise OptionError(f"--objective {options.objective} does not go with --module", "leave it out")
    if not Path(path).is_file():
        raise InputError(f"not found: `{path}`", "--module takes FILE.py:FUNCTION")
    check_output(output, (Path(path), *inputs), options.overwrite)
    return Path(path), registry.load(OBJECTIVES, "tensors")


def _suitable(folder: Path, options: TuneOptions) -> str:
    """Return the objective of a checkpoint that the user named none for."""
    from llmfast.export.checkpoint import load_config
    from llmfast.tune.student import DECODER_CLASS, model_class

    if options.teacher:
        return "distillation"
    return "causal-lm" if model_class(load_config(folder)) == DECODER_CLASS else "classification"


def _resolve(
    folder: Path, options: TuneOptions, plugin: ModuleType, precision: str, parallel: "Parallel"
) -> TuneOptions:
    """Fill in what the objective and the machine decide."""
    defaults = plugin.DEFAULTS
    batch_size = options.batch_size or defaults.batch_size
    if options.accumulate > batch_size:
        raise OptionError(f"--accumulate {options.accumulate}: a step has {batch_size} rows only")
    if parallel.world > batch_size:
        raise OptionError(f"--batch-size {batch_size}: fewer rows than the {parallel.world} processes")
    rate = options.learning_rate
    if rate is None:  # adapters start from nothing, and take longer strides
        rate = defaults.learning_rate * (4 if options.lora else 1)
    return replace(
        options,
        objective=_name(plugin),
        precision=precision,
        learning_rate=rate,
        layer_decay=options.layer_decay or defaults.layer_decay,
        epochs=options.epochs or defaults.epochs,
        batch_size=batch_size,
        seq_len=options.seq_len or min(defaults.seq_len, _positions(folder, options)),
        device=parallel.device.type,
    )


def _positions(folder: Path, options: TuneOptions) -> int:
    """Return how many positions a checkpoint's model has, as far as its config says."""
    from llmfast.export.checkpoint import load_config

    config = None if options.module else load_config(folder)
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def _load(folder: Path, plugin: ModuleType, chosen: Any, options: TuneOptions, companions: Path) -> Objective:
    if not options.module:
        from llmfast.tune.student import write_companions

        write_companions(folder, companions, _name(plugin) in ("regression", "distillation"))
    with contextlib.redirect_stdout(sys.stderr):  # what a user's module prints is no result
        objective: Objective = plugin.prepare(Job(folder, options, companions), chosen)
    if options.gradient_checkpointing:
        settings = {"use_reentrant": False}
        objective.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if options.lora:
        from llmfast.tune.adapters import add_adapters

        objective.model = add_adapters(objective.model, options.lora)
    return objective


def _unwrap(objective: Objective, options: TuneOptions, parallel: "Parallel") -> None:
    """Make the trained model a plain one: adapters merged, parts of a weight put together."""
    if options.lora:
        from llmfast.tune.adapters import merge_adapters

        objective.model = merge_adapters(objective.model)
    if options.gradient_checkpointing:
        objective.model.gradient_checkpointing_disable()
    objective.model = parallel.unwrap(objective.model)


def _write(
    objective: Objective,
    source: Path,
    staged: Path,
    log: Path,
    options: TuneOptions,
    facts: dict[str, Any],
    figures: dict[str, Any],
    companions: Path,
) -> None:
    from llmfast.tune.curves import draw

    mode = staged.stat().st_mode
    shutil.copytree(companions, staged, dirs_exist_ok=True)
    staged.chmod(mode)
    objective.save(staged)
    shutil.copyfile(log, staged / LOG)
    draw(log, staged / CURVES)
    versions = {name: importlib.metadata.version(name) for name in (*_VERSIONED, *(("peft",) if options.lora else ()))}
    step = Step(
        stage="tune",
        method=figures["objective"],
        options={key: value for key, value in facts.items() if key != "seed"} | {"steps": figures["steps"]},
        versions={"llmfast": llmfast.__version__} | versions,
        seed=options.seed,
    )
    before = () if options.module else read_lineage(source)
    measured = {"validations": figures["validations"], "loss": figures["loss"]}
    write_lineage(staged, (*before, step), {"tune": measured})


def _facts(folder: Path, options: TuneOptions, chosen: Any, parallel: "Parallel") -> dict[str, Any]:
    """Return everything that the result depends on, by the names of the options: no absolute paths."""
    from llmfast.export.checkpoint import folder_source
    from llmfast.export.hub import resolve_folder
    from llmfast.tune.fake_quantize import describe, parse_scheme

    kept = {key: value for key, value in asdict(options).items() if key not in _NOT_FACTS}
    kept["settings"] = asdict(chosen)
    if options.quantize_aware:
        kept["quantize_aware"] = describe(parse_scheme(options.quantize_aware))
    if options.module:
        kept["module"] = Path(options.module).name
        kept["source"] = {"id": folder.name, "sha256": sha256(folder)}
    else:
        kept["source"] = folder_source(folder)
    for name in ("data", "validation", "weights"):
        file: Path | None = getattr(options, name)
        kept[name] = {"id": file.name, "sha256": sha256(file)} if file else None
    kept["teacher"] = folder_source(resolve_folder(options.teacher)) if options.teacher else None
    return kept | {"processes": parallel.world}


def _count(model: Any) -> dict[str, int]:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"parameters": sum(size for size, _ in sizes), "trained_parameters": sum(size for size, on in sizes if on)}


def _name(plugin: ModuleType) -> str:
    return plugin.__name__.rpartition(".")[2].replace("_", "-")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and reports off the terminal: what matters is raised."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
