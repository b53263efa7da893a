"""Compare greedy decoding of a random T5-base-like and BART-base-like model with transformers, interleaved in one run.

    python scripts/compare_seq2seq.py --tokens 64 --rounds 5

Prints tokens per second of both (encoding included), and the median of the rounds' ratios. Weights are random, so
the answers mean nothing; both produce the same number of tokens because no end token is allowed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.utils import logging

from llmfast import report
from llmfast.bundle import ModelBundle
from llmfast.export.stage import ExportOptions, export
from llmfast.infer.rules import read_rules
from llmfast.infer.search import search
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.runtime import usable_cores

_COMMON = {"vocab_size": 32128, "d_model": 768, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "t5": {"d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "initializer_factor": 0.5},
    "bart": {
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "max_position_embeddings": 1024,
        "bos_token_id": 2,
    },
}


def main() -> None:
    """Make the models, and measure them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated for each source")
    parser.add_argument("--source-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            _compare(name, Path(folder), options)


def _compare(name: str, folder: Path, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(name, **_COMMON, **MODELS[name]), attn_implementation="eager"
    ).eval()
    model.save_pretrained(folder / "checkpoint")
    Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")).save(str(folder / "checkpoint" / "tokenizer.json"))
    fp32 = export(str(folder / "checkpoint"), folder / "fp32", ExportOptions(task="text2text-generation"))
    runs: dict[str, Callable[[np.ndarray], int]] = {"transformers": _run_transformers(model, options)}
    runs["llmfast fp32"] = _run_llmfast(fp32, options)
    for scheme in ("int8", "int4"):
        bundle = quantize(fp32.path, folder / scheme, QuantizeOptions(scheme))
        runs[f"llmfast {scheme}"] = _run_llmfast(bundle, options)
    speeds: dict[str, list[float]] = {label: [] for label in runs}
    for number in range(1 + options.rounds):
        ids = np.random.default_rng(number).integers(3, _COMMON["vocab_size"], (options.batch, options.source_tokens))
        for label, run in runs.items():
            start = time.perf_counter()
            tokens = run(ids)
            if number > 0:  # the first is a warm-up
                speeds[label].append(tokens / (time.perf_counter() - start))
            time.sleep(0.1)  # idle threads of the one spin for a while, and would take the other's cores
    report.out(
        f"{name}-base-like, random weights: {options.batch} x {options.source_tokens} source tokens, "
        f"{options.tokens} tokens each, {options.beams} beams, {usable_cores()} threads"
    )
    for label, samples in speeds.items():
        ratios = [one / other for one, other in zip(samples, speeds["transformers"], strict=True)]
        report.out(f"  {label:14} {statistics.median(samples):8.1f} tokens/s  x {statistics.median(ratios):.2f}")


def _run_transformers(model: Any, options: argparse.Namespace) -> Callable[[np.ndarray], int]:
    def run(ids: np.ndarray) -> int:
        tensor = torch.from_numpy(ids)
        with torch.inference_mode():
            found = model.generate(
                input_ids=tensor,
                attention_mask=torch.ones_like(tensor),
                do_sample=False,
                num_beams=options.beams,
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
            )
        return len(ids) * (found.shape[1] - 1)

    return run


def _run_llmfast(bundle: ModelBundle, options: argparse.Namespace) -> Callable[[np.ndarray], int]:
    engine = Seq2SeqEngine(bundle)
    rules = read_rules(
        bundle.path, engine.context_length, options.tokens, num_beams=options.beams, min_new_tokens=options.tokens
    )

    def run(ids: np.ndarray) -> int:
        engine.encode(ids, np.ones_like(ids))
        return sum(len(found.ids) for found in search(engine, rules))

    return run


if __name__ == "__main__":
    main()
