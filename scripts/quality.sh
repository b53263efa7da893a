#!/usr/bin/env bash
# Print the quality table as Markdown: 8 and 4 bit, the three sizes of mixed precision, and an int8 sentence encoder.
#
#   MODEL=fp32 CALIBRATION=train.txt DATA=dev.txt [ENCODER=minilm-fp32 PAIRS=sts.tsv] ./scripts/quality.sh
#
# MODEL is a float text-generation bundle, ENCODER a float embedding bundle, both made by `llmfast export`.
# OUT, METHOD, SIZES (MB of weights), NUM_SAMPLES, WINDOWS and SEQ_LEN change the rest; smaller ones try the script.
set -euo pipefail

: "${MODEL:?the float bundle}" "${CALIBRATION:?text to calibrate on}" "${DATA:?text to measure on}"
out=${OUT:-quality} method=${METHOD:-gptq} sizes=${SIZES:-92 105 146}
samples=${NUM_SAMPLES:-64} windows=${WINDOWS:-20} seq_len=${SEQ_LEN:-512}
mkdir -p "$out"

quantize() {  # NAME ARGUMENTS...: makes $out/NAME unless it is there
    local name=$1
    shift
    [ -e "$out/$name/llmfast.json" ] || llmfast quantize "$MODEL" -o "$out/$name" --calibration "$CALIBRATION" \
        --num-samples "$samples" --seq-len "$seq_len" --resume --no-measure "$@" > /dev/null
    bundles+=("$out/$name")
}

bundles=()
quantize int8 --scheme int8
quantize int8-smoothquant --scheme int8 --method smoothquant
quantize w8 --scheme w8
quantize int4 --scheme int4
quantize "int4-$method" --scheme int4 --method "$method"
known=()
for size in $sizes; do
    # Compared, so that one grid for all layers is taken where it serves better.
    quantize "mixed-$size" --target-size "${size}MB" --method "$method" --measure "${known[@]}"
    known=(--sensitivity "$out/mixed-$size")  # what layers cost is measured once
done

# Speed is not what this table is about: one round, as short as it can be.
llmfast bench "$MODEL" "${bundles[@]}" --data "$DATA" --num-samples "$windows" --seq-len "$seq_len" \
    --rounds 1 --warmup 0 -p 8 -n 2 --format json > "$out/decoder.json"
if [ -n "${ENCODER:-}" ]; then
    [ -e "$out/encoder-int8/llmfast.json" ] || llmfast quantize "$ENCODER" -o "$out/encoder-int8" --scheme int8 > /dev/null
    llmfast bench "$ENCODER" "$out/encoder-int8" --data "${PAIRS:?scored pairs, score<TAB>sentence<TAB>sentence}" \
        --rounds 1 --warmup 0 --shapes 1x8 --format json > "$out/encoder.json"
fi

python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

from llmfast.bundle import ModelBundle

folder = Path(sys.argv[1])


def rows(name: str) -> list[dict]:
    return json.loads((folder / name).read_text(encoding="utf-8"))["rows"]


print("| bundle | weights MB | bits/weight | KLD | top-1 % | ppl x |\n|---|--:|--:|--:|--:|--:|")
for row in rows("decoder.json"):
    path = folder / row["bundle"]
    files = ModelBundle.open(path).manifest.files if path.is_dir() else {}
    weights = sum(entry["bytes"] for file, entry in files.items() if ".onnx" in file) or row["size_bytes"]
    print(
        f"| {row['bundle']} | {weights / 1e6:.1f} | {row['bits_per_weight']:.2f} | {row['kld']:.4f} "
        f"| {row['top1_agreement'] * 100:.1f} | {row['perplexity_ratio']:.3f} |"
    )
if (folder / "encoder.json").exists():
    print("\n| encoder | MB | spearman | drop | cosine |\n|---|--:|--:|--:|--:|")
    first, *others = rows("encoder.json")
    for row in (first, *others):
        drop = first["spearman"] - row["spearman"]
        print(
            f"| {row['bundle']} | {row['size_bytes'] / 1e6:.1f} | {row['spearman']:.4f} | {drop:.4f} "
            f"| {row['cosine_to_baseline']:.5f} |"
        )
PYTHON
