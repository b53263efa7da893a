"""Compare the speed of `llmfast tune` with a loop by hand, on one model and one text.

    python scripts/train_small_llama.py text.txt -o small-llama --steps 1
    python scripts/tune_throughput.py small-llama text.txt

Both train the same windows in the same precision with AdamW and clipped gradients; the loop by hand does nothing else:
no log, no checkpoint, no validation, no progress bar. Each run is a process of its own, so that none gains by what the
other left in memory. Rounds alternate, so that a shared machine's drift hits both.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llmfast.tokenizer import Tokenizer
from llmfast.tune.options import TuneOptions
from llmfast.tune.stage import tune


def by_hand(checkpoint: Path, text: Path, steps: int, batch: int, length: int, precision: str, threads: int) -> float:
    """Train as a tutorial does, and return tokens per second after the first step."""
    torch.set_num_threads(threads)
    ids = Tokenizer.load(checkpoint).encode(text.read_text(encoding="utf-8"))
    windows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    windows = windows[torch.randperm(len(windows))]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        rows = windows[torch.arange(step * batch, (step + 1) * batch) % len(windows)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
    return steps * batch * length / (time.perf_counter() - start)


def by_llmfast(
    checkpoint: Path, text: Path, steps: int, batch: int, length: int, precision: str, threads: int
) -> float:
    """Train with `tune`, which logs every tenth step, and return the median of its tokens per second."""
    options = TuneOptions(
        text,
        max_steps=steps,
        batch_size=batch,
        seq_len=length,
        precision=precision,
        validation_split=0,
        threads=threads,
    )
    with tempfile.TemporaryDirectory() as folder:
        return float(tune(str(checkpoint), Path(folder) / "out", options).figures["tokens_per_s"])


def main() -> None:
    """Print both speeds of every round, and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    work = (options.checkpoint, options.text, options.steps, options.batch, options.length, options.precision)
    fresh = multiprocessing.get_context("spawn")
    ratios = []
    for number in range(options.rounds):
        order = [by_hand, by_llmfast] if number % 2 == 0 else [by_llmfast, by_hand]
        with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
            speeds = {run.__name__: pool.submit(run, *work, options.threads).result() for run in order}
        ratios.append(speeds["by_llmfast"] / speeds["by_hand"])
        print(f"by hand {speeds['by_hand']:.0f} tokens/s, llmfast {speeds['by_llmfast']:.0f}, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}, {options.precision}, {options.threads} threads")


if __name__ == "__main__":
    main()
