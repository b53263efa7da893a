"""Token by token: time per output token after the first, tokens per second, and the gaps between tokens.

TPOT = (latency - TTFT) / (output tokens - 1). The percentiles are of the gaps of one generation, and the figure is
their median over the rounds.
"""

import numpy as np

from llmfast.bench.subject import Subject, Trial
from llmfast.bench.workload import case_of
from llmfast.bundle import SEQ2SEQ_TASKS
from llmfast.report import Column

ORDER = 40
KIND = "speed"
TASKS = ("text-generation", *SEQ2SEQ_TASKS)
NEEDS = ("vocab_size",)
HIGHER_IS_BETTER = {
    "tpot_s{case}": False,
    "decode_tokens_per_s{case}": True,
    "itl_p50_s{case}": False,
    "itl_p95_s{case}": False,
    "itl_p99_s{case}": False,
}
COLUMNS = (
    Column("{case}TPOT ms", "tpot_s{case}", lambda value: f"{value * 1e3:.2f}"),
    Column("{case}decode tok/s", "decode_tokens_per_s{case}", lambda value: f"{value:.1f}"),
    Column("x", "decode_tokens_per_s{case}_ratio", lambda value: f"{value:.2f}"),
)


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return time per output token, tokens per second, and percentiles of the gaps, for every shape."""
    figures: dict[str, float] = {}
    for shape, (batch, _) in trial.shapes.items():
        times, case = subject.generate(trial, shape).tokens_s, case_of(shape, trial.shapes)
        tpot = (times[-1] - times[0]) / (len(times) - 1)
        gaps = np.diff(times)
        subject.latencies[f"itl_s{case}"] = gaps.tolist()
        figures |= {f"tpot_s{case}": tpot, f"decode_tokens_per_s{case}": batch / tpot}
        for percent in (50, 95, 99):
            figures[f"itl_p{percent}_s{case}"] = float(np.percentile(gaps, percent))
    return figures
