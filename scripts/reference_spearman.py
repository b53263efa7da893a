#!/usr/bin/env python3
"""Print the rank correlation that PyTorch's embeddings reach on scored sentence pairs.

The reference for `llmfast bench --data pairs.tsv`: mean pooling over tokens, as all-MiniLM-L6-v2 does.
Usage: .venv/bin/python scripts/reference_spearman.py CHECKPOINT PAIRS.tsv   (needs llmfast[export,dev])
"""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from llmfast.text import read_pairs


def main(checkpoint: str, pairs_file: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint).eval()

    def embed(texts: list[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(rows)

    scores, first, second = zip(*read_pairs(Path(pairs_file)), strict=True)
    similarities = (embed(list(first)) * embed(list(second))).sum(-1)
    sys.stdout.write(f"{spearmanr(scores, similarities).statistic:.6f}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
