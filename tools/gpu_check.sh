#!/usr/bin/env bash
# Runs what needs a CUDA device, with whatever torch and pytest are installed:
#   bash tools/gpu_check.sh [PYTEST OPTIONS]   everything: the tests marked gpu, then the parts below
#   bash tools/gpu_check.sh loader             the loader's: its tests, then `fasttht bench load`
#   bash tools/gpu_check.sh core               the attack's: its tests and the kernels', then `bench attack` and `step`
# Reports are appended to ${OUT:-docs/results}/<part>.json, one line of JSON for each run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
OUT="${OUT:-docs/results}"

# Exit code 5 of pytest: no such test was found. It is said, and is no failure.
gpu_tests() {
  local code=0
  "$PYTHON" -m pytest -m gpu "$@" || code=$?
  if [ "$code" -eq 5 ]; then
    echo "gpu_check: skipped: no test marked gpu in: ${*:-tests}"
  elif [ "$code" -ne 0 ]; then
    return "$code"
  fi
}

has_cuda() {
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

bench_loader() {
  if ! has_cuda; then
    echo "gpu_check: skipped: fasttht bench load; torch finds no CUDA device"
    return 0
  fi
  local cores counts=(1)
  cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)))')"
  if [ "$cores" -ge 8 ]; then
    counts+=(8)
  else
    echo "gpu_check: skipped: bench load with 8 workers; there are $cores cores"
  fi
  mkdir -p "$OUT"
  "$PYTHON" -m fasttht bench load --workers "${counts[@]}" --windows 5 --window-s 1 --output "$OUT/loader.json"
}

bench_core() {
  if ! has_cuda; then
    echo "gpu_check: skipped: fasttht bench attack and step; torch finds no CUDA device"
    return 0
  fi
  mkdir -p "$OUT"
  "$PYTHON" -m fasttht bench attack --batch-size 64 --windows 5 --output "$OUT/attack.json"
  "$PYTHON" -m fasttht bench step --batch-size 64 --windows 5 --output "$OUT/step.json"
}

case "${1:-}" in
  core)
    shift
    gpu_tests tests/attacks tests/kernels "$@"
    bench_core
    ;;
  loader)
    shift
    gpu_tests tests/pipelines "$@"
    bench_loader
    ;;
  *)
    gpu_tests "$@"
    bench_loader
    bench_core
    ;;
esac
