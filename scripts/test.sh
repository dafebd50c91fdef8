#!/usr/bin/env bash
# Runs the linter and all tests. Sets up what it needs; tests of a real ComfyUI run where COMFYUI_PATH points to one.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m pytest -q --durations=10 "$@"
