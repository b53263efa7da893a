"""OpenVINO's int8 (NNCF) against llmfast's int8, on one encoder: latency in interleaved rounds, and rank correlation.

Runs in an environment of its own, which has the peer and llmfast:

    python -m venv ov && ov/bin/pip install openvino nncf '.[cpu]'
    ov/bin/python scripts/peers/openvino_encoder.py minilm minilm-int8 --data sts-dev.tsv

Prints a Markdown table; a ratio above 1 says that llmfast is faster.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
from tokenizers import Tokenizer

from llmfast.batch_session import open_encoder

Batch = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fp32", type=Path, help="fp32 bundle of an embedding model; the peer quantizes its graph")
    parser.add_argument("int8", type=Path, help="int8 bundle that llmfast made of it")
    parser.add_argument("--data", type=Path, required=True, help="lines of score<TAB>sentence<TAB>sentence")
    parser.add_argument("--shapes", default="8x128,32x64")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()

    pairs = [line.rstrip("\n").split("\t") for line in options.data.open(encoding="utf-8")]
    tokenizer = load_tokenizer(options.fp32)
    runners = {
        "OpenVINO fp32": compile_peer(openvino.Core().read_model(options.fp32 / "model.onnx"), options.threads),
        "OpenVINO int8": compile_peer(quantize_peer(options.fp32, tokenizer, pairs), options.threads),
        "llmfast fp32": open_ours(options.fp32, options.threads),
        "llmfast int8": open_ours(options.int8, options.threads),
    }
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    times = measure(runners, shapes, options.rounds, vocab_size=tokenizer.get_vocab_size())
    print(f"| system | {' | '.join(f'{b}x{n} ms | llmfast int8 x' for b, n in shapes)} | spearman |")
    print("|---|" + "--:|--:|" * len(shapes) + "--:|")
    for name, run in runners.items():
        cells = [
            f"{np.median(times[name, shape]) * 1e3:.1f} | "
            f"{np.median(np.array(times[name, shape]) / np.array(times['llmfast int8', shape])):.2f}"
            for shape in shapes
        ]
        print(f"| {name} | {' | '.join(cells)} | {spearman(run, tokenizer, pairs):.4f} |")


def load_tokenizer(bundle: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    limit = json.loads((bundle / "llmfast.json").read_text(encoding="utf-8"))["architecture"]
    tokenizer.enable_truncation(min(limit.get("max_seq_length") or 512, limit.get("context_length") or 512))
    tokenizer.enable_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Batch:
    rows = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([row.ids for row in rows], np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
        "token_type_ids": np.array([row.type_ids for row in rows], np.int64),
    }


def quantize_peer(bundle: Path, tokenizer: Tokenizer, pairs: list[list[str]]) -> Any:
    """Quantize as the peer's documentation does for Transformers: 300 samples, fast bias correction."""
    model = openvino.Core().read_model(bundle / "model.onnx")
    names = {name for port in model.inputs for name in port.get_names()}
    texts = [text for pair in pairs[-150:] for text in pair[1:]]  # the far end; the score uses all lines
    samples = [{key: value for key, value in encode(tokenizer, [text]).items() if key in names} for text in texts]
    return nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)


def compile_peer(model: Any, threads: int) -> Any:
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    names = [next(iter(port.get_names())) for port in compiled.inputs]
    output = compiled.output("sentence_embedding")
    request = compiled.create_infer_request()
    return lambda batch: request.infer({name: batch[name] for name in names})[output].copy()


def open_ours(bundle: Path, threads: int) -> Any:
    session = open_encoder(bundle / "model.onnx", threads=threads, is_batch=True)
    names = [value.name for value in session.get_inputs()]
    return lambda batch: session.run(["sentence_embedding"], {name: batch[name] for name in names})[0]


def measure(
    runners: dict[str, Any], shapes: list[tuple[int, ...]], rounds: int, vocab_size: int
) -> dict[tuple[str, tuple[int, ...]], list[float]]:
    """Return the seconds of each round, runners taking turns; the best of three runs each, after a warm-up."""
    rng = np.random.default_rng(0)
    times: dict[tuple[str, tuple[int, ...]], list[float]] = {}
    for shape in shapes:
        for number in range(rounds + 1):
            ids = rng.integers(1000, vocab_size, shape)
            batch = {
                "input_ids": ids,
                "attention_mask": np.ones(shape, np.int64),
                "token_type_ids": np.zeros(shape, np.int64),
            }
            for name, run in runners.items():
                seconds = []
                for _ in range(3):
                    start = time.perf_counter()
                    run(batch)
                    seconds.append(time.perf_counter() - start)
                time.sleep(0.05)  # threads of either library spin for a while, and would take the next one's cores
                if number:
                    times.setdefault((name, shape), []).append(min(seconds))
    return times


def spearman(run: Any, tokenizer: Tokenizer, pairs: list[list[str]]) -> float:
    cosines = []
    for start in range(0, len(pairs), 16):
        chosen = pairs[start : start + 16]
        left, right = (run(encode(tokenizer, [pair[side] for pair in chosen])) for side in (1, 2))
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosines += list((left * right).sum(1) / norms)
    return float(np.corrcoef(ranks(np.array(cosines)), ranks(np.array([float(pair[0]) for pair in pairs])))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0, those of equal values averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


if __name__ == "__main__":
    main()
