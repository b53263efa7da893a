"""The methods of one pruning: which half they belong to, their options and their shares."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmfast import registry
from llmfast.errors import OptionError
from llmfast.prune.options import PruneOptions
from llmfast.quantize.plan import Choice, share_out

STRUCTURED, MASKS = "prune.structured", "prune.masks"
FOLDERS = (STRUCTURED, MASKS)


def choose_methods(options: PruneOptions) -> tuple[str, tuple[Choice, ...]]:
    """Load the methods and give each its settings.

    Returns:
        Their folder, and the methods in the order in which they work.

    Raises:
        OptionError: an unknown name, key or value; methods that do not go together; no share, or one too many.
    """
    known = {name: folder for folder in FOLDERS for name in registry.names(folder)}
    names = [name.strip() for name in options.method.split(",")]
    for name in names:
        if name not in known:
            raise registry.unknown_name("method", name, list(known))
    folders = {known[name] for name in names}
    if len(folders) > 1:
        masks = ", ".join(name for name in names if known[name] == MASKS)
        raise OptionError(
            f"--method {options.method}: {masks} works on an ONNX graph, the others on a checkpoint",
            "prune the checkpoint, export it, then prune the bundle",
        )
    if len(set(names)) < len(names) or (folders == {MASKS} and len(names) > 1):
        raise OptionError(f"--method {options.method}: one method of a kind at a time")
    plugins = {name: registry.load(known[name], name) for name in names}
    settings = share_out(options.settings, plugins)
    choices = [Choice(name, plugin, registry.make_options(plugin, settings[name])) for name, plugin in plugins.items()]
    _check_shares(options, choices, folders == {MASKS})
    # Those that take no share change the numbers of tokens, so they come after all that reads text.
    choices.sort(key=lambda one: not getattr(one.plugin, "TAKES_RATIO", True))
    return next(iter(folders)), tuple(choices)


def ratio_of(choice: Choice, ratios: Mapping[str, float]) -> float:
    """Return a method's share."""
    return ratios.get(choice.name, ratios.get("", 0.0))


def resolved(choices: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """Return the resolved options of all methods, for the lineage."""
    return {choice.name: asdict(choice.options) for choice in choices}


def _check_shares(options: PruneOptions, choices: list[Choice], is_masks: bool) -> None:
    takers = [one.name for one in choices if getattr(one.plugin, "TAKES_RATIO", True)]
    for name in options.ratios:
        if name and name not in takers:
            raise OptionError(f"--ratio {name}=: not a method of this run that takes a share")
    if not takers:
        if options.ratios or options.target_params:
            raise OptionError(f"{choices[0].name} takes no share: what stays follows from the text")
        return
    if options.ratios and options.target_params:
        raise OptionError("--ratio and --target-params contradict each other", "leave one of the two out")
    if options.ratios and options.pattern:
        raise OptionError("--pattern says what goes, and so does --ratio", "leave one of the two out")
    if not is_masks and (options.pattern or options.include or options.exclude):
        raise OptionError("--pattern, --include and --exclude are for masks", "methods that make them: see --list")
    if is_masks and (options.target_params or options.measure_speed):
        raise OptionError(
            f"{choices[0].name} leaves as many parameters as there were, and no speed to gain",
            "zeros are counted with --ratio; layers, ffn, heads and width make a model smaller and faster",
        )
    if is_masks and options.pattern and options.allocation != "uniform":
        raise OptionError("--pattern leaves as many zeros in every layer", "leave out --allocation")
    without = [name for name in takers if name not in options.ratios and "" not in options.ratios]
    if without and not options.target_params and not options.pattern:
        raise OptionError(f"no share for {', '.join(without)}", "for example --ratio 0.25, or --target-params 75%")
    if not is_masks and options.allocation == "sensitivity" and (not options.target_params or len(takers) < 2):
        raise OptionError(
            "--allocation sensitivity divides --target-params between several methods",
            "every block of a plain checkpoint has one size, so none of its layers can have a share of its own",
        )
