"""Energy: joules per token and tokens per joule, from RAPL or NVML, or an estimate that says so (`energy_source`).

Of a decoder, per token written after the first; of an encoder, per token read.
"""

from llmfast.bench.encoding import time_encoder
from llmfast.bench.subject import Spent, Subject, Trial
from llmfast.bench.workload import TEXT_TASKS, case_of
from llmfast.report import Column

ORDER = 57
KIND = "speed"
TASKS = TEXT_TASKS
NEEDS = ("vocab_size",)
HIGHER_IS_BETTER = {
    "joules_per_token{case}": False,
    "tokens_per_joule{case}": True,
    "joules_per_token_{shape}": False,
    "tokens_per_joule_{shape}": True,
}
COLUMNS = (
    Column("{case}J/token", "joules_per_token{case}", lambda value: f"{value:.3g}"),
    Column("{shape} J/token", "joules_per_token_{shape}", lambda value: f"{value:.3g}"),
)


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return joules per token and its inverse for every shape; nothing where the counter did not move."""
    figures: dict[str, float] = {}
    for shape, (batch, length) in trial.shapes.items():
        if subject.engine is None:
            encoding = time_encoder(subject, trial, shape)
            figures |= _figures(f"_{shape}", encoding.spent, batch * length * len(encoding.latencies_s))
        else:
            generation = subject.generate(trial, shape)
            written = batch * (len(generation.tokens_s) - 1)
            figures |= _figures(case_of(shape, trial.shapes), generation.decode, written)
    return figures


def _figures(case: str, spent: Spent, tokens: int) -> dict[str, float]:
    if spent.joules <= 0:
        return {}
    return {f"joules_per_token{case}": spent.joules / tokens, f"tokens_per_joule{case}": tokens / spent.joules}
