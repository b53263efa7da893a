"""The prompt: time to first token (prompt plus first greedy pick), and prompt tokens per second.

Of an encoder-decoder, the prompt is the source, and the first token takes a step of the decoder too.
Tokenization and loading are left out. Source: reference definitions of TTFT in
https://docs.nvidia.com/nim/benchmarking/llm/latest/metrics.html
"""

from llmfast.bench.subject import Subject, Trial
from llmfast.bundle import SEQ2SEQ_TASKS
from llmfast.report import Column

ORDER = 30
KIND = "speed"
TASKS = ("text-generation", *SEQ2SEQ_TASKS)
NEEDS = ("vocab_size",)
HIGHER_IS_BETTER = {"ttft_s": False, "prefill_tokens_per_s": True}
COLUMNS = (
    Column("TTFT ms", "ttft_s", lambda value: f"{value * 1e3:.1f}"),
    Column("prefill tok/s", "prefill_tokens_per_s", lambda value: f"{value:.0f}"),
    Column("x", "prefill_tokens_per_s_ratio", lambda value: f"{value:.2f}"),
)


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return the time to the first token in seconds, and the prompt's tokens per second."""
    generation = subject.generate(trial)
    return {
        "ttft_s": generation.tokens_s[0],
        "prefill_tokens_per_s": trial.prompt_tokens / generation.prefill_s,
    }
