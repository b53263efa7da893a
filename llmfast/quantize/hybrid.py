"""A decoder's second graph, which reads prompts: other numbers over the same KV cache.

Decoding one token reads every weight for a single row, so the fewest bits win; a prompt multiplies each weight by
many rows, and there integer products of 8-bit weights and activations win. Both graphs lie over one data file:
what they have in common, embedding and head above all, is stored once. The cache belongs to either, since keys and
values are float32 (or int8 with the same scales) and what methods fold into weights leaves them as they are.
"""

from llmfast import registry
from llmfast.bundle import PREFILL, TEXT_GENERATION, ModelBundle
from llmfast.errors import OptionError, UnsupportedError
from llmfast.graph.feeds import CONTRACT
from llmfast.graph.model import OnnxModel
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.plan import DEFAULT_ROUNDING, Plan

_HEAD_BITS = "head_bits"
# Outliers of activations cost a prompt more than anything else: unsmoothed, SmolLM2 begins other answers.
_W8A8, _SMOOTHED = "int8", "smoothquant"


def make_plans(options: QuantizeOptions) -> tuple[Plan, Plan | None]:
    """Return what to do with a bundle's graphs, and with its second graph for prompts if there will be one.

    A setting that names a plug-in, `int8.granularity`, is for the plans that have it, any other for the first.

    Raises:
        OptionError: as `Plan.make`; or methods after which the graphs would cache different values.
    """
    given = {typed.replace("-", "_"): value for typed, value in options.settings.items()}
    if options.prefill is None:
        return Plan.make(options.scheme, options.method, given), None
    method = options.prefill_method
    if method is None:
        method = _SMOOTHED if options.prefill == _W8A8 else DEFAULT_ROUNDING
    ours, theirs = _names(options.scheme, options.method), _names(options.prefill, method)
    owners = {name: name.rpartition(".")[0] for name in given}
    settings = {name: value for name, value in given.items() if owners[name] not in theirs - ours}
    first = Plan.make(options.scheme, options.method, settings)
    settings = {name: value for name, value in given.items() if owners[name] in theirs}
    key = f"{options.prefill}.{_HEAD_BITS}"
    if hasattr(first.scheme.options, _HEAD_BITS) and _has_head_bits(options.prefill):
        settings.setdefault(key, str(first.scheme.options.head_bits))  # what is alike is stored once
    second = Plan.make(options.prefill, method, settings)
    if _turning(first) != _turning(second):
        raise OptionError(
            "one of the graphs would cache turned values, the other not",
            "give rotate to both --method and --prefill-method, or to neither",
        )
    return first, second


def require_decoder(bundle: ModelBundle, model: OnnxModel) -> None:
    """Refuse a second graph for prompts where nothing is cached.

    Raises:
        UnsupportedError: the model is no decoder of llmfast's kind.
    """
    inputs = {value.name for value in model.proto.graph.input}
    if bundle.manifest.task != TEXT_GENERATION or not set(CONTRACT) <= inputs:
        raise UnsupportedError(
            f"`{bundle.path}` gets no second graph: --{PREFILL} is for decoders that llmfast exported",
            f"leave --{PREFILL} out",
        )


def _names(scheme: str, method: str) -> set[str]:
    """Return the plug-ins that were typed."""
    return {scheme, *(name.strip() for name in method.split(","))}


def _has_head_bits(scheme: str) -> bool:
    return registry.has_option(registry.load("quantize.schemes", scheme), _HEAD_BITS)


def _turning(plan: Plan) -> list[object]:
    """Return the transforms after which the cache holds other values, with their options."""
    return [one.options for one in plan.transforms if getattr(one.plugin, "TURNS_CACHE", False)]
