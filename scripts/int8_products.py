"""Compare int8 products with ONNX Runtime's default: python scripts/int8_products.py FP32 INT8... --data TEXT

On x86 processors without VNNI the default saturates (`llmfast.processor`). Both are opened of each bundle, and scored
against FP32 on the last half of some windows of --data; then prompts of 512 tokens and 16 tokens after each are timed,
interleaved. Prints a JSON object for each: KL divergence in nats, median milliseconds of a prompt and of a token.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.infer.engine import Engine
from llmfast.processor import saturates_int8
from llmfast.text import read_text
from llmfast.tokenizer import Tokenizer

_WINDOW, _SCORED, _DECODED = 512, 256, 16


def open_engine(path: Path, as_uint8: bool) -> Engine:
    """Open a bundle with or without the switch for processors that saturate."""
    with patch("llmfast.runtime.saturates_int8", lambda: as_uint8):
        return Engine(ModelBundle.open(path), max_length=2 * _WINDOW)


def log_probabilities(engine: Engine, window: np.ndarray) -> np.ndarray:
    """Return float64 [scored, vocab], what the engine predicts behind each of the last tokens."""
    engine.reset()
    logits = engine.score_last(window, _SCORED).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def time_once(engine: Engine, window: np.ndarray) -> tuple[float, float]:
    """Return milliseconds of a prompt, and of a token after it."""
    engine.reset()
    start = time.perf_counter()
    engine.prefill(window)
    middle = time.perf_counter()
    for token in window[:_DECODED]:
        engine.decode(int(token))
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3 / _DECODED


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("int8", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.fp32)
    ids = np.array(tokenizer.encode(read_text(arguments.data)[: 16 * _WINDOW * arguments.windows]), np.int64)
    windows = [ids[start : start + _WINDOW] for start in range(0, _WINDOW * arguments.windows, _WINDOW)]
    assert len(windows[-1]) == _WINDOW, "the text is too short"
    reference = open_engine(arguments.fp32, False)
    engines = {str(arguments.fp32): reference}
    for path in arguments.int8:
        engines |= {f"{path} default": open_engine(path, False), f"{path} as uint8": open_engine(path, True)}
    divergences: dict[str, list[float]] = {name: [] for name in engines}
    for window in windows:
        expected = log_probabilities(reference, window)
        for name, engine in engines.items():
            rows = (np.exp(expected) * (expected - log_probabilities(engine, window))).sum(axis=1)
            divergences[name].append(float(rows.mean()))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for number in range(arguments.rounds):
        for name, engine in engines.items():
            times[name].append(time_once(engine, windows[number % len(windows)]))
    print(json.dumps({"saturates_int8": saturates_int8()}))
    for name, found in times.items():
        prompt_ms, token_ms = (round(statistics.median(column), 1) for column in zip(*found, strict=True))
        kld = round(statistics.mean(divergences[name]), 4)
        print(json.dumps({"bundle": name, "kld": kld, "prompt_ms": prompt_ms, "token_ms": token_ms}))


if __name__ == "__main__":
    main()
