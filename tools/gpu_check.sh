#!/usr/bin/env bash
# Runs the tests that need a CUDA device, with whatever torch and pytest are installed: bash tools/gpu_check.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m pytest -m gpu "$@"
