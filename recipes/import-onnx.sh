#!/bin/sh
# Someone else's model.onnx: what is in it, 8 bits in place of its floats, and the proof against the original.
# Needs llmfast[cpu]. MODEL is a folder with model.onnx, config and tokenizer, or a lone .onnx file, whoever made it.
set -eu
: "${MODEL:?set MODEL to a folder with model.onnx, or to a .onnx file}"
OUT=${OUT:-import-onnx}
SCHEME=${SCHEME:-int8}
MAX_SIZE=${MAX_SIZE:-200MB} # of the result, or this exits with 7
MAX_KLD=${MAX_KLD:-0.1}     # and the distance from the original that its answers may have

llmfast inspect "$MODEL"
llmfast quantize "$MODEL" --output "$OUT/$SCHEME" --scheme "$SCHEME" --max-kld "$MAX_KLD" --overwrite
llmfast bench "$MODEL" "$OUT/$SCHEME" --rounds 3 --max-size "$MAX_SIZE"
