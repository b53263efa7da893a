"""Generate text: a decoder that goes on with a prompt or answers a message."""

from collections.abc import Sequence
from typing import Any

from llmfast.bundle import ModelBundle

AUTO_MODEL = "AutoModelForCausalLM"
OUTPUTS = ("logits",)

MAX_TOKENS = 256


def answer(
    bundle: ModelBundle, texts: Sequence[str], provider: str = "cpu", threads: int | None = None
) -> list[dict[str, Any]]:
    """Answer every text greedily, through the chat template where the model has one.

    Returns:
        `{"text", "answer", "generated_tokens", "finish_reason"}` for each text.

    Raises:
        InputError: no tokenizer, or a text that is empty or does not fit the context.
        UnsupportedError: the graph is no decoder of llmfast's kind.
    """
    from llmfast.infer.engine import Engine
    from llmfast.infer.generate import encode_prompt, finish, generate
    from llmfast.infer.sampling import Sampling
    from llmfast.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(bundle.path)
    engine = Engine(bundle, provider, threads)
    answers = []
    for text in texts:
        prompt_ids = encode_prompt(tokenizer, text)
        generation = finish(generate(engine, tokenizer, prompt_ids, MAX_TOKENS, Sampling(), eos_ids=tokenizer.eos_ids))
        answers.append(
            {
                "text": text,
                "answer": generation.text,
                "generated_tokens": generation.generated_tokens,
                "finish_reason": generation.finish_reason,
            }
        )
    return answers
