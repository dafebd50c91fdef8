#!/usr/bin/env bash
# Runs the linter and the tests, with --all also the slow ones: every workflow in a server and in a browser, training runs.
# Sets up what it needs; tests of a real ComfyUI run where COMFYUI_PATH points to one.
# With CVVAE_SCREENSHOTS=screenshots the browser's pictures of workflows, results and errors are kept in that folder.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen="not slow"
if [ "${1:-}" = --all ]; then
  chosen=""
  shift
fi
bash scripts/setup.sh
.venv/bin/python -m ruff check .
# Two processes of one thread each: the tests' tensors are too small for two threads to be of use.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/python -m pytest -q --durations=10 -n 2 --dist loadfile -m "$chosen" "$@"
