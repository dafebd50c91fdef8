#!/usr/bin/env bash
# Sends a real clip through the built-in model and back: demo.mp4 beside the README. Sets up what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/python -m cvvae reconstruct "${1:-workflows/media/flower.mp4}" "${2:-demo.mp4}"
