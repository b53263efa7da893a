"""Train a small Llama on a text, so that quality can be measured on weights that were never rounded.

    python scripts/train_small_llama.py text.txt -o small-llama --steps 600
    llmfast export small-llama -o fp32

Byte-level BPE of the text itself, a few million parameters, trained by `llmfast tune`: some minutes on two cores. A
twentieth of the text is held back; its perplexity is printed.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from llmfast.tune.options import TuneOptions
from llmfast.tune.stage import tune

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


def make_model(folder: Path, tokenizer: Tokenizer, hidden_size: int, layers: int) -> None:
    """Save a Llama with random weights and its tokenizer."""
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "bos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


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
    tokenizer = train_tokenizer(options.text.read_text(encoding="utf-8"), options.vocab_size)
    settings = TuneOptions(
        options.text,
        learning_rate=options.rate,
        max_steps=options.steps,
        batch_size=options.batch,
        seq_len=options.length,
        weight_decay=0.1,
        warmup=0.05,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), tokenizer, options.hidden_size, options.layers)
        tuned = tune(folder, options.output, settings)
    for line in tuned.figures["validations"]:
        print(f"step {line['step']:5d}  loss {line['validation_loss']:.3f}  perplexity {line['perplexity']:.1f}")
    print(f"{options.output}: {tuned.figures['parameters']:,} parameters, {tuned.figures['tokens_per_s']:.0f} tokens/s")


if __name__ == "__main__":
    main()
