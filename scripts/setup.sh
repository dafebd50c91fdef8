#!/usr/bin/env bash
# Prepares .venv in the repository: torch, this package and what its tests need. Does nothing the second time.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
"$python" -c "import torch" 2>/dev/null || "$python" -m pip install --quiet "torch==2.13.0"
"$python" -c "import cvvae, av, kornia, einops, psutil, huggingface_hub, pytest, xdist, playwright" 2>/dev/null ||
    "$python" -m pip install --quiet --editable ".[test]"
