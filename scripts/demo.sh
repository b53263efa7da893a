#!/usr/bin/env bash
# Set up and take a real language model through the whole pipeline: recipes/quickstart.sh on SmolLM2-135M.
# Needs 1.5 GB of disk for packages, 1 GB for models; about three minutes on two cores once installed.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/setup.sh cpu,export
./scripts/fetch_models.sh
export PATH="$PWD/.venv/bin:$PATH"

# Text to measure quality on that every Python ships: its own reference manual, 0.7 MB of English.
text=.models/python-reference.txt
[ -e "$text" ] || python -c 'from pydoc_data.topics import topics; print(*topics.values(), sep="\n\n")' > "$text"

DATA=${DATA:-$text} OUT=${OUT:-demo} ./recipes/quickstart.sh
