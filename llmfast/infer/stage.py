"""The infer command: a bundle and a prompt, or texts, to answers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmfast import registry
from llmfast.bundle import TEXT_GENERATION, UNKNOWN_TASK, ModelBundle
from llmfast.errors import OptionError, UnsupportedError
from llmfast.infer.generate import MAX_TOKENS, Generation, check_limits, encode_prompt, finish, generate
from llmfast.infer.opening import open_speculating
from llmfast.infer.prompt_cache import PromptCache
from llmfast.infer.sampling import Sampling
from llmfast.report import note
from llmfast.runtime import placement, suit_provider
from llmfast.tokenizer import Tokenizer


def infer(
    model: Path,
    prompt: str,
    *,
    emit: Callable[[str], None],
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = MAX_TOKENS,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    provider: str = "cpu",
    threads: int | None = None,
    speculate: bool | None = None,
    draft: Path | None = None,
    prompt_cache: Path | None = None,
) -> Generation:
    """Answer a prompt with a text-generation model.

    Args:
        model: bundle directory.
        prompt: what the user says; a model without a chat template goes on with it instead.
        emit: gets every piece of the answer as soon as it is known.
        system: what the assistant is told first.
        raw: leave the chat template out and go on with the prompt.
        max_tokens: most tokens to generate.
        sampling: how tokens are chosen; None is greedy.
        stop: strings that end the answer and are not part of it.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        speculate: guess tokens that one step verifies; None does where it can't change the answer and may pay.
        draft: a bundle whose model guesses them; None looks them up in prompt and answer.
        prompt_cache: file with the keys and values of a prompt: what both begin with is not computed again. It is
            written where it held less than three quarters of this prompt.

    Raises:
        OptionError: max_tokens below 1, an empty stop string, a system prompt without a chat template,
            or a model of another task.
        InputError: the bundle or its tokenizer can't be read, the prompt does not fit the context, or the draft
            has another tokenizer.
        UnsupportedError: the graph is no decoder that llmfast runs, the provider is absent, or the model can't
            verify drafts that were asked for.
    """
    check_limits(max_tokens, stop)
    bundle = ModelBundle.open(model)
    if bundle.manifest.task not in (TEXT_GENERATION, UNKNOWN_TASK):
        raise OptionError(f"`{model}` generates no text: its task is {bundle.manifest.task}")
    provider = suit_provider(bundle, provider)
    tokenizer = Tokenizer.load(bundle.path)
    prompt_ids = encode_prompt(tokenizer, prompt, system, raw)
    cache = PromptCache(prompt_cache, bundle) if prompt_cache else None
    engine, speculation = open_speculating(
        bundle, tokenizer, len(prompt_ids), max_tokens, provider, threads, speculate, draft
    )
    if engine.note:
        note(f"note: `{bundle.name}`: {engine.note}")
    generation = finish(
        generate(
            engine,
            tokenizer,
            prompt_ids,
            max_tokens,
            sampling or Sampling(),
            stop,
            tokenizer.eos_ids,
            speculation,
            cache,
        ),
        emit,
    )
    if cache:
        note(cache.spell(len(prompt_ids), cache.save(engine, prompt_ids)))
    if speculation and generation.drafted_tokens and not speculation.is_exact and (speculate or draft):
        note(f"note: `{bundle.name}` rounds several tokens otherwise than one: --no-speculate may answer differently")
    return replace(generation, placement=placement(*engine.sessions))


def answer(
    model: Path, texts: Sequence[str], *, provider: str = "cpu", threads: int | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Answer several texts with a model of any task.

    Args:
        model: bundle directory.
        texts: prompts, texts to classify or embed, contexts of a question, documents to rank, paths of images or audio.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        options: those of the task's `INFER_OPTIONS` that are given.

    Returns:
        One dictionary a text, whose keys depend on the task; an image has `image`, a recording
        `audio` and in `text` what was said, all others the `text`. In the order of the texts, save for text-ranking.

    Raises:
        OptionError: an option that the task does not have.
        UnsupportedError: the model does not say its task.
    """
    bundle = ModelBundle.open(model)
    if bundle.manifest.task == UNKNOWN_TASK:
        raise UnsupportedError(f"`{model}` does not say its task", "give a bundle that llmfast wrote")
    check_options(bundle, options)
    provider = suit_provider(bundle, provider)
    answers: list[dict[str, Any]] = registry.load("tasks", bundle.manifest.task).answer(
        bundle, texts, provider, threads, **options
    )
    return answers


def text_option(task: str) -> str:
    """Return the option of `infer` that gives a task its texts: `prompt`, or `context` and the like."""
    return str(getattr(registry.load("tasks", task), "TEXT_OPTION", "prompt"))


def check_options(bundle: ModelBundle, names: Iterable[str]) -> None:
    """Refuse options of `infer` that a model's task does not have.

    Args:
        bundle: the model; one that does not say its task is taken for a text-generation model.
        names: the options, `snake_case`.

    Raises:
        OptionError: the message names the tasks that have the option.
    """

    def options_of(task: str) -> tuple[str, ...]:
        return (text_option(task), *registry.load("tasks", task).INFER_OPTIONS)

    task = TEXT_GENERATION if bundle.manifest.task == UNKNOWN_TASK else bundle.manifest.task
    for name in names:
        if name not in options_of(task):
            fitting = ", ".join(other for other in registry.names("tasks") if name in options_of(other))
            raise OptionError(f"--{name.replace('_', '-')} is for {fitting}; `{bundle.path}` is for {task}")


def spell_speed(generation: Generation) -> str:
    """Return counts and speeds of an answer as a line for people."""
    decode = generation.decode_tokens_per_s
    speed = f", {decode:.1f} tokens/s" if decode else ""
    if generation.drafted_tokens:
        speed += f", {generation.accepted_tokens} of {generation.drafted_tokens} drafted tokens accepted"
    return (
        f"[{generation.prompt_tokens} prompt tokens, first token after {generation.ttft_s * 1e3:.0f} ms; "
        f"{generation.generated_tokens} tokens{speed}; ended by {generation.finish_reason}]"
    )
