#!/bin/sh
# A translator in 8 bits: BLEU and chrF against references may fall by so much and no more.
# The default is a toy of English and German numbers, trained on the spot: two minutes on 2 cores.
# Needs llmfast[cpu,export,eval]. MODEL is a Hugging Face folder or hub id (Marian, M2M-100, NLLB, mBART, T5).
set -eu
HERE=$(dirname "$0")
OUT=${OUT:-translation}
DATA=${DATA:-$HERE/translation.txt} # source<TAB>reference
TEXT=${TEXT:-four hundred seventy seven}
SOURCE=${SOURCE:-en} TARGET=${TARGET:-de} # languages, as the model calls them
MAX_BLEU=${MAX_BLEU:-2} # points that BLEU may fall by, or this exits with 7
MAX_CHRF=${MAX_CHRF:-2} # and chrF
MODEL=${MODEL:-}
if [ -z "$MODEL" ]; then
    MODEL=$OUT/toy
    [ -d "$MODEL" ] || python "$HERE/../scripts/toy_translator.py" "$MODEL"
fi

llmfast export "$MODEL" --output "$OUT/fp32" --task translation --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int8" --scheme int8 --overwrite
llmfast infer "$OUT/int8" --prompt "$TEXT" --source-lang "$SOURCE" --target-lang "$TARGET"
llmfast bench "$OUT/fp32" "$OUT/int8" --data "$DATA" -p 16 -n 16 --rounds 3 \
    --max-drop "bleu=$MAX_BLEU" --max-drop "chrf=$MAX_CHRF"
