"""Train a small Llama on a text, so that quality can be measured on weights that were never rounded.

    python scripts/train_small_llama.py text.txt -o small-llama --steps 600
    llmfast export small-llama -o fp32

Byte-level BPE of the text itself, a few million parameters, AdamW with a cosine schedule: some minutes on two cores.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|end|>"


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Learn byte-level BPE merges; every text can be spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return tokenizer


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int, batch: int, length: int, rate: float) -> float:
    """Train on random windows of int64 [tokens]; return the mean loss of the last tenth, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        starts = torch.randint(len(ids) - length, (batch,))
        windows = torch.stack([ids[first : first + length] for first in starts.tolist()])
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {losses[-1]:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main() -> None:
    """Train, and save a folder that `llmfast export` reads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="UTF-8 text to train on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    text = options.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text, options.vocab_size)
    ids = torch.tensor(tokenizer.encode(text).ids)
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=max(1, options.hidden_size // 128),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters, {len(ids):,} tokens")
    loss = train(model, ids, options.steps, options.batch, min(options.length, len(ids) - 1), options.rate)
    model.save_pretrained(options.output)
    tokenizer.save(str(options.output / "tokenizer.json"))
    settings = {"eos_token": END, "bos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (options.output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"{options.output}: perplexity {math.exp(loss):.1f} on the training text")


if __name__ == "__main__":
    main()
