#!/bin/sh
# A decoder loses a quarter of its parameters, learns from the original what it forgot, and becomes int8 and int4.
# SmolLM2-135M on 2 cores: 20 minutes of distillation; the default, a small Llama trained on the spot, some minutes.
# Needs llmfast[cpu,export,tune]. MODEL is a Hugging Face folder or hub id; TEXT and DEV are UTF-8 texts.
set -eu
HERE=$(dirname "$0")
OUT=${OUT:-prune-repair}
TEXT=${TEXT:-$HERE/../llmfast/quantize/texts/calibration.txt}
DEV=${DEV:-$HERE/../llmfast/quantize/texts/held_out.txt}
EPOCHS=${EPOCHS:-4}
MAX_RATIO=${MAX_RATIO:-1.6} # perplexity against the original's, or this exits with 7
if [ -z "${MODEL:-}" ]; then
    MODEL=$OUT/small-llama
    [ -d "$MODEL" ] ||
        python "$HERE/../scripts/train_small_llama.py" "$TEXT" --output "$MODEL" --steps 200 --vocab-size 1024
fi

llmfast prune "$MODEL" --output "$OUT/pruned" --method layers,ffn --target-params 75% --overwrite
llmfast tune "$OUT/pruned" --output "$OUT/repaired" --data "$TEXT" --teacher "$MODEL" --overwrite \
    --epochs "$EPOCHS" --lr 3e-4 --set label_weight=0.3 --average 0.98
llmfast export "$MODEL" --output "$OUT/fp32" --overwrite
llmfast export "$OUT/repaired" --output "$OUT/repaired-fp32" --overwrite
llmfast quantize "$OUT/repaired-fp32" --output "$OUT/int8" --scheme int8 --overwrite
llmfast quantize "$OUT/repaired-fp32" --output "$OUT/int4" --scheme int4 --overwrite
llmfast bench "$OUT/fp32" "$OUT/repaired-fp32" "$OUT/int8" "$OUT/int4" --data "$DEV" --max-perplexity-ratio "$MAX_RATIO"
