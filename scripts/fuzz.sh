#!/usr/bin/env bash
# Fuzz what reads foreign files: ./scripts/fuzz.sh [FOLDER [SECONDS [RUNS]]]. The folder keeps corpora and findings.
# Each target gets SECONDS (1200), and then as many more as RUNS (20,000) take. A finding is a crash, an exception
# other than LlmfastError, 5 seconds of CPU time, or 512 MiB. Then 2,000 random command lines.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-.fuzz} seconds=${2:-1200} runs=${3:-20000}
mkdir -p "$folder"
./scripts/setup.sh cpu,export,dev
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0'
failed=0
for target in onnx safetensors gguf json tokenizer archive template; do
    log=$folder/$target.log
    fuzz=(nice -n 19 .venv/bin/python scripts/fuzz.py "$target" "$folder/$target")
    if "${fuzz[@]}" "-max_total_time=$seconds" >"$log" 2>&1; then
        done=$(sed -n 's/^Done \([0-9]*\) runs.*/\1/p' "$log")
        [ "$done" -ge "$runs" ] || "${fuzz[@]}" "-runs=$((runs - done))" >>"$log" 2>&1 || failed=1
        echo "$target: $(grep '^Done' "$log" | paste -sd ' ')"
    else
        failed=1
        echo "$target: finding, see $log and $folder/$target" >&2
    fi
done
LLMFAST_FUZZ_EXAMPLES=2000 .venv/bin/python -m pytest -q tests/test_fuzz.py || failed=1
exit "$failed"
