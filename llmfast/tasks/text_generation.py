"""Generate text: a decoder that goes on with a prompt or answers a message."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError
from llmfast.infer.generate import MAX_TOKENS, encode_prompt, finish, generate
from llmfast.infer.opening import open_speculating
from llmfast.infer.sampling import SAMPLING_OPTIONS, Sampling
from llmfast.runtime import placement
from llmfast.tokenizer import Tokenizer

AUTO_MODEL = "AutoModelForCausalLM"
OUTPUTS = ("logits",)
INFER_OPTIONS = ("system", "raw", "max_tokens", "stop", "speculate", "draft", "prompt_cache", *SAMPLING_OPTIONS)


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = MAX_TOKENS,
    stop: Sequence[str] = (),
    speculate: bool | None = None,
    draft: Path | None = None,
    prompt_cache: Path | None = None,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Answer every text, through the chat template where the model has one.

    Args:
        bundle: the model.
        texts: prompts.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        system: what the assistant is told first.
        raw: leave the chat template out and go on with the text.
        max_tokens: most tokens to generate.
        stop: strings that end an answer.
        speculate: guess tokens that one step verifies; None does where it can't change the answer and may pay.
        draft: a bundle whose model guesses them.
        prompt_cache: must be None: it is for one prompt.
        sampling: fields of `Sampling`; none is greedy. The seed is that of the first text.

    Returns:
        `Generation.document` of each text.

    Raises:
        OptionError: a prompt cache.
        InputError: no tokenizer, or a text that is empty or does not fit the context.
        UnsupportedError: the graph is no decoder that llmfast runs.
    """
    if prompt_cache is not None:
        raise OptionError("--prompt-cache is for one prompt, not for several")
    tokenizer = Tokenizer.load(bundle.path)
    prompts = [encode_prompt(tokenizer, text, system, raw) for text in texts]
    longest = max(map(len, prompts), default=1)
    engine, speculation = open_speculating(bundle, tokenizer, longest, max_tokens, provider, threads, speculate, draft)
    choice = Sampling(**sampling)
    answers = []
    for number, (text, ids) in enumerate(zip(texts, prompts, strict=True), start=1):
        own = choice.of_text(number)
        pieces = generate(engine, tokenizer, ids, max_tokens, own, stop, tokenizer.eos_ids, speculation)
        answers.append(replace(finish(pieces), placement=placement(*engine.sessions)).document(text))
    return answers


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return str(answer["answer"])
