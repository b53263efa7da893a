"""The prompt: time to first token (prompt plus first greedy pick), and prompt tokens per second.

Of an encoder-decoder, the prompt is the source, and the first token takes a step of the decoder too.
Tokenization and loading are left out. Source: reference definitions of TTFT in
https://docs.nvidia.com/nim/benchmarking/llm/latest/metrics.html
"""

from llmfast.bench.subject import Subject, Trial
from llmfast.bench.workload import case_of
from llmfast.bundle import SEQ2SEQ_TASKS
from llmfast.report import Column

ORDER = 30
KIND = "speed"
TASKS = ("text-generation", *SEQ2SEQ_TASKS)
NEEDS = ("vocab_size",)
HIGHER_IS_BETTER = {"ttft_s{case}": False, "prefill_tokens_per_s{case}": True}
COLUMNS = (
    Column("{case}TTFT ms", "ttft_s{case}", lambda value: f"{value * 1e3:.1f}"),
    Column("{case}prefill tok/s", "prefill_tokens_per_s{case}", lambda value: f"{value:.0f}"),
    Column("x", "prefill_tokens_per_s{case}_ratio", lambda value: f"{value:.2f}"),
)


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return the time to the first token in seconds, and the prompts' tokens per second, for every shape."""
    figures = {}
    for shape, (batch, length) in trial.shapes.items():
        generation, case = subject.generate(trial, shape), case_of(shape, trial.shapes)
        figures[f"ttft_s{case}"] = generation.tokens_s[0]
        figures[f"prefill_tokens_per_s{case}"] = batch * length / generation.prefill_s
    return figures
