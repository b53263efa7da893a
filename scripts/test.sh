#!/usr/bin/env bash
# Set up and run lint, types and tests. Arguments go to pytest: ./scripts/test.sh -k quantize
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/setup.sh cpu,export,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Each file runs in one process, for its fixtures are costly.
.venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@"
