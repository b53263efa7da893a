"""Token by token: time per output token after the first, tokens per second, and the gaps between tokens.

TPOT = (latency - TTFT) / (output tokens - 1). The percentiles are of the gaps of one generation.
"""

import numpy as np

from llmfast.bench.subject import Subject, Trial
from llmfast.bundle import SEQ2SEQ_TASKS
from llmfast.report import Column

ORDER = 40
KIND = "speed"
TASKS = ("text-generation", *SEQ2SEQ_TASKS)
NEEDS = ("vocab_size",)
HIGHER_IS_BETTER = {"tpot_s": False, "decode_tokens_per_s": True, "itl_p50_s": False, "itl_p95_s": False}
COLUMNS = (
    Column("TPOT ms", "tpot_s", lambda value: f"{value * 1e3:.2f}"),
    Column("decode tok/s", "decode_tokens_per_s", lambda value: f"{value:.1f}"),
    Column("x", "decode_tokens_per_s_ratio", lambda value: f"{value:.2f}"),
)


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return time per output token, its inverse, and the median and 95th percentile of the gaps."""
    times = subject.generate(trial).tokens_s
    tpot = (times[-1] - times[0]) / (len(times) - 1)
    p50, p95 = np.quantile(np.diff(times), [0.5, 0.95])
    return {
        "tpot_s": tpot,
        "decode_tokens_per_s": 1 / tpot,
        "itl_p50_s": float(p50),
        "itl_p95_s": float(p95),
    }
