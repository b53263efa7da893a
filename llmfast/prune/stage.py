"""`llmfast prune`: a checkpoint becomes smaller, or the weights of an ONNX graph get zeros."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmfast.bundle import FOREIGN_MODELS, MANIFEST, check_output
from llmfast.errors import OptionError
from llmfast.prune.methods import MASKS, STRUCTURED, choose_methods
from llmfast.prune.options import PruneOptions
from llmfast.prune.result import Pruned
from llmfast.quantize.pairs import check_data
from llmfast.quantize.plan import Choice
from llmfast.report import note


def prune(source: str, output: Path, options: PruneOptions) -> Pruned:
    """Prune a model and compare it with what it was.

    Args:
        source: a Hugging Face folder or hub id for methods in prune/structured, a bundle or .onnx file for those in
            prune/masks.
        output: the new checkpoint's or bundle's directory.
        options: see `PruneOptions`.

    Raises:
        OptionError: an unknown method or setting, or a share that leaves nothing.
        InputError: the model is missing, incomplete or has NaN weights; too little text.
        UnsupportedError: a model that the method has no way with.
        GateError: a gate was missed; nothing is left at `output`.
        OutputExistsError: the output exists.
    """
    folder, choices = _prepare(source, output, options)
    if folder == STRUCTURED:
        from llmfast.prune.checkpoint.stage import prune_checkpoint  # PyTorch is needed from here on

        return prune_checkpoint(source, output, choices, options)
    from llmfast.prune.graph.stage import prune_graph

    return prune_graph(Path(source), output, choices[0], options)


def plan(source: str, output: Path, options: PruneOptions) -> list[dict[str, Any]]:
    """Check everything `prune` checks before it works, and return what would be pruned: sizes, or rows of layers."""
    folder, choices = _prepare(source, output, options)
    files = (options.calibration.path, options.data)
    if folder == MASKS:
        from llmfast.prune.graph.stage import list_layers, open_graphs

        _, graphs = open_graphs(Path(source), output, choices[0], options)
        check_data(files, {role: model for role, (model, _) in graphs.items()})
        return list_layers(graphs.values())
    check_data(files, {})  # a checkpoint reads texts
    from llmfast.prune.checkpoint.stage import list_sizes

    if options.allocation == "sensitivity":
        note("note: the methods' shares are chosen once it is measured what each division loses")
    return list_sizes(source, choices, options)


def _prepare(source: str, output: Path, options: PruneOptions) -> tuple[str, tuple[Choice, ...]]:
    folder, choices = choose_methods(options)
    check_places(source, output, folder, choices, options.overwrite)
    return folder, choices


def check_places(source: str, output: Path, folder: str, choices: Sequence[Choice], overwrite: bool) -> None:
    """Refuse an output that would destroy something, and a model that is not of the methods' kind.

    Args:
        source: as of `prune`.
        output: as of `prune`.
        folder: the methods'.
        choices: the methods.
        overwrite: what llmfast wrote may be replaced.

    Raises:
        OptionError: the output overlaps the source; or the methods work on the other kind of model.
        OutputExistsError: the output exists.
    """
    path = Path(source)
    check_output(output, (path,), overwrite)
    is_graph = path.suffix == ".onnx" or any((path / name).is_file() for name in (MANIFEST, *FOREIGN_MODELS))
    names = ", ".join(choice.name for choice in choices)
    if folder == STRUCTURED and is_graph:
        raise OptionError(
            f"{names} works on a PyTorch checkpoint, `{source}` is an ONNX model", "prune before `llmfast export`"
        )
    if folder == MASKS and not is_graph and (path / "config.json").is_file():
        raise OptionError(
            f"{names} works on an ONNX model, `{source}` is a PyTorch checkpoint", "run `llmfast export` first"
        )
