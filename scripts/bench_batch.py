"""Compare answering many prompts in continuous batches with answering them one at a time, interleaved in one run.

    python scripts/bench_batch.py BUNDLE --prompts 64 --batch-sizes 8,16,32 --rounds 3

Prompts are pieces of a text (the calibration text that llmfast ships, or --data), of 64 to 256 tokens; every answer has
128 tokens, since no end token ends it. Prints for each way the median of tokens per second over the whole run, prompts
included, and the ratio to one at a time; and how many greedy answers differ.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from llmfast import quantize
from llmfast.bundle import ModelBundle
from llmfast.infer.batch import Request
from llmfast.infer.engine import Engine
from llmfast.infer.generate import finish, generate
from llmfast.infer.lanes import Lanes
from llmfast.infer.opening import open_lanes
from llmfast.infer.sampling import Sampling
from llmfast.runtime import usable_cores
from llmfast.text import read_text
from llmfast.tokenizer import Tokenizer

_TEXT = Path(quantize.__file__).parent / "texts" / "calibration.txt"


def make_requests(tokenizer: Tokenizer, text: str, prompts: int, lengths: tuple[int, int], new: int) -> list[Request]:
    """Return prompts of random lengths from random places of a text."""
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int64)
    rng = np.random.default_rng(0)
    requests = []
    for number in range(prompts):
        length = int(rng.integers(lengths[0], lengths[1] + 1))
        start = int(rng.integers(0, max(1, len(ids) - length)))
        requests.append(Request(number, ids[start : start + length], new))
    return requests


def run_alone(engine: Engine, tokenizer: Tokenizer, requests: list[Request]) -> list[str]:
    """Answer one prompt after another."""
    return [
        finish(generate(engine, tokenizer, request.prompt_ids, request.max_tokens, Sampling())).text
        for request in requests
    ]


def run_batch(lanes: Lanes, requests: list[Request]) -> list[str]:
    """Answer all in continuous batches."""
    events = lanes.answer(iter(requests))
    answers = {event.id: event.generation.text for event in events if event.generation is not None}
    return [answers[request.id] for request in requests]


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=_TEXT, help="text that the prompts are cut from")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--min-length", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", default="16", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    arguments = parser.parse_args()
    bundle = ModelBundle.open(arguments.bundle)
    tokenizer = Tokenizer.load(bundle.path)
    tokenizer.eos_ids = ()  # answers of one length
    lengths = arguments.min_length, arguments.max_length
    requests = make_requests(tokenizer, read_text(arguments.data), arguments.prompts, lengths, arguments.new_tokens)
    capacity = arguments.max_length + arguments.new_tokens
    engine = Engine(bundle, threads=arguments.threads, max_length=capacity)
    ways = [0, *map(int, arguments.batch_sizes.split(","))]  # 0: one at a time
    seconds: dict[int, list[float]] = {rows: [] for rows in ways}
    answers: dict[int, list[str]] = {}
    parts = {
        rows: open_lanes(bundle, "cpu", arguments.threads, capacity, arguments.prompts, rows)[0] for rows in ways[1:]
    }
    for _ in range(arguments.rounds):
        for rows in ways:
            # New ones each time: they would copy what rows still hold of the round before.
            lanes = Lanes(parts[rows], tokenizer) if rows else None
            start = time.perf_counter()
            if lanes:
                answers[rows] = run_batch(lanes, requests)
            else:
                answers[rows] = run_alone(engine, tokenizer, requests)
            seconds[rows].append(time.perf_counter() - start)
    generated = arguments.prompts * arguments.new_tokens
    alone = statistics.median(seconds[0])
    print(f"{arguments.prompts} prompts, {sum(len(r.prompt_ids) for r in requests)} tokens; {generated} generated")
    for rows in ways:
        median = statistics.median(seconds[rows])
        differing = sum(left != right for left, right in zip(answers[rows], answers[0], strict=True))
        figures = {
            "batch_size": rows or 1,
            "one_at_a_time": rows == 0,
            "tokens_per_s": round(generated / median, 1),
            "seconds": [round(value, 2) for value in seconds[rows]],
            "ratio": round(alone / median, 3),
            "differing_answers": differing,
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
