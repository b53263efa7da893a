#!/usr/bin/env bash
# Fuzz what reads foreign files: ./scripts/fuzz.sh [FOLDER [RUNS]]. The folder keeps corpora and findings.
# A finding is a crash, an exception other than LlmfastError, 5 seconds, or 512 MiB. Then 2,000 random command lines.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-.fuzz} runs=${2:-20000}
mkdir -p "$folder"
./scripts/setup.sh cpu,export,dev
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0'
failed=0
for target in onnx safetensors gguf json tokenizer archive; do
    log=$folder/$target.log
    if nice -n 19 .venv/bin/python scripts/fuzz.py "$target" "$folder/$target" "-runs=$runs" >"$log" 2>&1; then
        echo "$target: $(tail -1 "$log")"
    else
        failed=1
        echo "$target: finding, see $log and $folder/$target" >&2
    fi
done
LLMFAST_FUZZ_EXAMPLES=2000 .venv/bin/python -m pytest -q tests/test_fuzz.py || failed=1
exit "$failed"
