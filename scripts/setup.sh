#!/usr/bin/env bash
# Make .venv and install llmfast with the extras named, for example: ./scripts/setup.sh cpu,export
set -euo pipefail
cd "$(dirname "$0")/.."
: "${1:?name the extras, for example: ./scripts/setup.sh cpu,export}"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than Python 3.11" >&2
    echo "hint: set PYTHON to a newer one" >&2
    exit 5
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing llmfast[$1] into .venv (PyTorch is large; the first time takes minutes)" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$1]" \
    2> >(grep -v '^WARNING: Location' >&2)
