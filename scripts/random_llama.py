"""Write a checkpoint of TinyLlama's architecture with random bfloat16 weights: python scripts/random_llama.py FOLDER.

1.1 billion parameters with 22 layers (--layers), one shard per layer, and a tokenizer of bytes. It says nothing, but is
as large and as fast as a model that does: for measurements of memory and speed where no such model is at hand.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 32000


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    options = parser.parse_args()
    print(f"{make_checkpoint(options.folder, options.layers):,} parameters in {options.folder}")


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write config, tokenizer and weights, one shard at a time; return the number of parameters."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json")
    generator = torch.Generator().manual_seed(0)
    shards = {"embed": {"model.embed_tokens": (VOCAB, HIDDEN)}}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        linears = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
            "self_attn.v_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shards[f"layer-{layer:02}"] = {f"{prefix}.{name}": shape for name, shape in linears.items()}
    shards["head"] = {"model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    weight_map, parameters = {}, 0
    for shard, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            # Norms of ones; a standard deviation of 0.02 is what Llama starts its training from.
            values = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
            tensors[f"{name}.weight"] = values.to(torch.bfloat16)
            parameters += values.numel()
        save_file(tensors, folder / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parameters


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer whose tokens are bytes: the first 256 rows of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


if __name__ == "__main__":
    main()
