"""Which engine runs a decoder: over one slab where the graph allows it, over a cache that grows otherwise."""

from dataclasses import replace
from pathlib import Path

from llmfast.bundle import PREFILL, TEXT_GENERATION, ModelBundle
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.infer.decoder import Decoder, runs
from llmfast.infer.engine import Engine
from llmfast.infer.lanes import count_lanes
from llmfast.infer.memory import DEFAULT_ROWS, MemoryPlan, fits, plan_memory
from llmfast.infer.rows import OneRow, Rows, SlabRows
from llmfast.infer.speculate import Drafter, DraftModel, PromptLookup, Speculation
from llmfast.report import note
from llmfast.runtime import resolve_threads
from llmfast.tokenizer import Tokenizer
from llmfast.tuned import SessionSettings, settings_for

# Prompt lookup is worth its opening, a quarter of a second for SmolLM2, from so many tokens on, unless asked for.
_COPYABLE_TOKENS, _ANSWER_TOKENS = 64, 32


def open_decoder(
    bundle: ModelBundle,
    provider: str = "cpu",
    threads: int | None = None,
    max_length: int | None = None,
    chunk_tokens: int | None = None,
    spin: bool = True,
    verify: bool = False,
    even_if_inexact: bool = False,
    settings: SessionSettings | None = None,
) -> Decoder:
    """Open a text-generation model, llmfast's own or another exporter's.

    Args:
        bundle: the model.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        max_length: positions that will be needed; None means the model's whole context.
        chunk_tokens: tokens of a prompt that go through the graph at once; None takes that of the settings.
        spin: let idle threads spin.
        verify: let steps verify drafted tokens, where graph and provider allow it; the `Engine` says so.
        even_if_inexact: verify with the graph for prompts where the bundle has one: it takes several tokens faster, and
            rounds otherwise than the one that decodes.
        settings: of the session; None takes those that were found best on this machine, or the defaults.

    Raises:
        UnsupportedError: the graph is no decoder, or one of a form that no engine runs.
        InputError: the model can't be read, or does not say how long its context is.
        ResourceError: no memory for the KV cache.
    """
    settings = settings or settings_for(bundle, provider, threads)
    threads, spin = settings.threads, spin and settings.spin
    chunk_tokens = settings.chunk_tokens if chunk_tokens is None else chunk_tokens
    if _follows_contract(bundle):
        graph, rows = _to_verify(bundle, even_if_inexact) if verify and provider == "cpu" else (None, ())
        base = settings.block_base
        return Engine(
            bundle, provider, threads, max_length, chunk_tokens, spin, graph=graph, verify_rows=rows, block_base=base
        )
    # Own bundles need neither of these, and are opened without reading their graphs first.
    from llmfast.infer.growing import GrowingEngine
    from llmfast.thirdparty import adopt, can_adopt

    if not can_adopt(bundle):
        return GrowingEngine(bundle, provider, threads, max_length, chunk_tokens, spin)
    from llmfast.graph.model import OnnxModel

    adopted, model = adopt(bundle, OnnxModel.load(bundle.model))
    graph = model.proto.SerializeToString()
    engine = Engine(adopted, provider, threads, max_length, chunk_tokens, spin, graph=graph)
    with runs(bundle.model):
        engine.decode(0)
    engine.reset()
    return engine


def _to_verify(bundle: ModelBundle, even_if_inexact: bool) -> tuple[bytes | None, tuple[int, ...]]:
    """Return a graph in place of the model's own, if it takes one, and the numbers of rows that are then verified."""
    from llmfast.graph.model import OnnxModel
    from llmfast.graph.verify import ROWS, add_verification

    if even_if_inexact and PREFILL in bundle.graphs:
        return None, ROWS
    able = add_verification(OnnxModel.load(bundle.model))
    return (None, ()) if able is None else (able.SerializeToString(), ROWS)


def open_speculating(
    bundle: ModelBundle,
    tokenizer: Tokenizer,
    prompt_tokens: int,
    max_tokens: int,
    provider: str = "cpu",
    threads: int | None = None,
    speculate: bool | None = None,
    draft: Path | None = None,
) -> tuple[Decoder, Speculation | None]:
    """Open a text-generation model for one answer, with what guesses its tokens.

    Args:
        bundle: the model.
        tokenizer: the bundle's.
        prompt_tokens: tokens of the prompt.
        max_tokens: most tokens of the answer.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        speculate: guess tokens, even where answers may then differ at near ties; None guesses where they can't and it
            may pay.
        draft: a smaller bundle that guesses; None looks the tokens up in prompt and answer.

    Raises:
        OptionError: a draft that is not wanted, or generates no text.
        InputError: a draft with another tokenizer.
        UnsupportedError: speculation was asked for, and the model or the provider does not allow it.
        others: as `open_decoder`.
    """
    if draft is not None and speculate is False:
        raise OptionError("--draft and --no-speculate exclude each other")
    is_asked = bool(speculate) or draft is not None
    may_pay = prompt_tokens >= _COPYABLE_TOKENS and max_tokens >= _ANSWER_TOKENS
    wanted = is_asked or (speculate is None and may_pay)
    length = prompt_tokens + max_tokens
    # Threads of two models that both spin take each other's cores.
    spin = draft is None
    decoder = open_decoder(bundle, provider, threads, length, spin=spin, verify=wanted, even_if_inexact=is_asked)
    if not isinstance(decoder, Engine) or not decoder.verify_rows:
        if is_asked:
            reason = f"the provider is {provider}" if provider != "cpu" else "its attention can't be split by tokens"
            raise UnsupportedError(
                f"`{bundle.name}` can't verify drafts: {reason}", "leave --speculate and --draft out"
            )
        return decoder, None
    drafter: Drafter = PromptLookup()
    if draft is not None:
        vocab_size = min(tokenizer.vocab_size, decoder.vocab_size)
        drafter = DraftModel(_open_draft(draft, bundle, tokenizer, provider, threads, length), vocab_size)
    return decoder, Speculation(decoder, drafter, even_if_inexact=is_asked)


def _open_draft(
    path: Path, bundle: ModelBundle, tokenizer: Tokenizer, provider: str, threads: int | None, length: int
) -> Decoder:
    draft = ModelBundle.open(path)
    if draft.manifest.task != TEXT_GENERATION:
        raise OptionError(f"--draft `{path}` generates no text: its task is {draft.manifest.task}")
    if Tokenizer.load(draft.path).vocabulary != tokenizer.vocabulary:
        raise InputError(
            f"`{path}` can't draft for `{bundle.name}`: their tokenizers differ",
            "a draft is a smaller or more quantized model of the same family",
        )
    return open_decoder(draft, provider, threads, length, spin=False)


def open_rows(
    bundle: ModelBundle,
    provider: str,
    threads: int | None,
    capacity: int,
    most_rows: int,
    batch_size: int | None,
    neighbours: int = 1,
) -> tuple[Rows, MemoryPlan]:
    """Open a text-generation model for several sequences at once, and say what they take.

    Args:
        bundle: the model.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        capacity: positions of a sequence.
        most_rows: sequences that there can be at once.
        batch_size: sequences asked for; None chooses by the memory.
        neighbours: processes that share this machine's memory, this one included.

    Raises:
        UnsupportedError: several are asked for, and the graph or the provider takes one at a time.
        ResourceError: they do not fit the memory.
    """
    (rows,), plan = open_lanes(bundle, provider, threads, capacity, most_rows, batch_size, neighbours, most_lanes=1)
    return rows, plan


def open_lanes(
    bundle: ModelBundle,
    provider: str,
    threads: int | None,
    capacity: int,
    most_rows: int,
    batch_size: int | None,
    neighbours: int = 1,
    most_lanes: int | None = None,
    fast_alone: bool = False,
) -> tuple[list[Rows], MemoryPlan]:
    """Open a model as `open_rows` does, and divide the rows among lanes, which share the threads; see `Lanes`.

    Args:
        bundle, provider, threads, capacity, most_rows, batch_size, neighbours: as `open_rows` takes them.
        most_lanes: None takes as many as threads and rows allow.
        fast_alone: a lane that is alone has all threads. For that the model is opened twice; where memory is short for
            it there is one lane.
    """
    settings, lanes = settings_for(bundle, provider, threads), 1
    shared = resolve_threads(settings.threads)
    if provider == "cpu" and _follows_contract(bundle) and (not fast_alone or fits(2 * bundle.size_bytes)):
        lanes = min(most_lanes or shared, count_lanes(shared, min(batch_size or DEFAULT_ROWS, most_rows)))
    # Each lane's own thread takes part in what it runs.
    narrow = settings if lanes == 1 else replace(settings, threads=shared - (lanes - 1))
    engine = open_decoder(bundle, provider, max_length=capacity, settings=narrow)
    if isinstance(engine, Engine) and engine.takes_rows:
        is_twice = fast_alone and lanes > 1
        alone = open_decoder(bundle, provider, max_length=capacity, settings=settings) if is_twice else engine
        assert isinstance(alone, Engine)
        plan = plan_memory(bundle, engine, capacity, most_rows, batch_size, neighbours, copies=1 + is_twice)
        if (fewer := count_lanes(shared, plan.rows)) < lanes:  # memory has no room for all rows
            del engine, alone
            return open_lanes(bundle, provider, threads, capacity, most_rows, batch_size, neighbours, fewer, fast_alone)
        return [SlabRows(engine, (plan.rows + lane) // lanes, capacity, alone) for lane in range(lanes)], plan
    if engine.note:
        note(f"note: `{bundle.name}`: {engine.note}")
    if (batch_size or 0) > 1:
        raise UnsupportedError(
            f"`{bundle.path}` answers one prompt at a time with {provider}: its graph is another "
            "exporter's, or its cache is on a device",
            "leave --batch-size out",
        )
    return [OneRow(engine)], plan_memory(bundle, engine, capacity, 1, batch_size, neighbours)


def _follows_contract(bundle: ModelBundle) -> bool:
    """Return whether a decoder's graph is of llmfast's form, as far as the bundle says."""
    inputs = bundle.manifest.graphs.get("model", {}).get("inputs", ())
    return not inputs or "seqlens_k" in inputs
