"""What work costs: CPU seconds of all threads per 1,000 tokens, and currency per million tokens.

Of a decoder, tokens read (input) and tokens written (output) apart, as services charge them: price per million =
price per hour / 3600 * 10^6 / tokens per second, for one stream on the whole machine. Threads that spin while they
wait count: nobody else can have these cores meanwhile.
"""

from llmfast.bench.encoding import time_encoder
from llmfast.bench.subject import Subject, Trial
from llmfast.bench.workload import TEXT_TASKS, case_of
from llmfast.report import Column

ORDER = 56
KIND = "speed"
TASKS = TEXT_TASKS
NEEDS = ("vocab_size",)
HIGHER_IS_BETTER = {
    "prefill_cpu_s_per_1k_tokens{case}": False,
    "decode_cpu_s_per_1k_tokens{case}": False,
    "price_per_million_input_tokens{case}": False,
    "price_per_million_output_tokens{case}": False,
    "cpu_s_per_1k_tokens_{shape}": False,
    "price_per_million_tokens_{shape}": False,
}
COLUMNS = (
    Column("{case}CPU s/1k out", "decode_cpu_s_per_1k_tokens{case}", lambda value: f"{value:.2f}"),
    Column("{case}price/M in", "price_per_million_input_tokens{case}", lambda value: f"{value:.4g}"),
    Column("{case}price/M out", "price_per_million_output_tokens{case}", lambda value: f"{value:.4g}"),
    Column("{shape} CPU s/1k", "cpu_s_per_1k_tokens_{shape}", lambda value: f"{value:.3f}"),
    Column("{shape} price/M", "price_per_million_tokens_{shape}", lambda value: f"{value:.4g}"),
)


def measure(subject: Subject, trial: Trial) -> dict[str, float]:
    """Return CPU seconds per 1,000 tokens of every shape, and prices where the trial has one."""
    return _of_encoder(subject, trial) if subject.engine is None else _of_decoder(subject, trial)


def _of_decoder(subject: Subject, trial: Trial) -> dict[str, float]:
    figures = {}
    for shape, (batch, length) in trial.shapes.items():
        done, case = subject.generate(trial, shape), case_of(shape, trial.shapes)
        read, written = batch * length, batch * (len(done.tokens_s) - 1)
        figures[f"prefill_cpu_s_per_1k_tokens{case}"] = done.prefill.cpu_s / read * 1e3
        figures[f"decode_cpu_s_per_1k_tokens{case}"] = done.decode.cpu_s / written * 1e3
        if trial.price_per_hour is not None:
            per_second = trial.price_per_hour / 3600 * 1e6
            figures[f"price_per_million_input_tokens{case}"] = per_second * done.prefill_s / read
            decode_s = done.tokens_s[-1] - done.tokens_s[0]
            figures[f"price_per_million_output_tokens{case}"] = per_second * decode_s / written
    return figures


def _of_encoder(subject: Subject, trial: Trial) -> dict[str, float]:
    figures = {}
    for shape, (batch, length) in trial.shapes.items():
        done = time_encoder(subject, trial, shape)
        tokens = batch * length * len(done.latencies_s)
        figures[f"cpu_s_per_1k_tokens_{shape}"] = done.spent.cpu_s / tokens * 1e3
        if trial.price_per_hour is not None:
            price = trial.price_per_hour / 3600 * sum(done.latencies_s)
            figures[f"price_per_million_tokens_{shape}"] = price / tokens * 1e6
    return figures
