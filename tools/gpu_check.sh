#!/usr/bin/env bash
# Runs what needs a CUDA device, in under 9 minutes on one, with whatever torch and pytest are installed:
#   bash tools/gpu_check.sh [core|loader|all] [PYTEST OPTIONS]
# core: the attack's tests and the kernels', then the benchmarks of ops, attacks, steps and vanishing gradients.
# loader: the loader's tests, then `fasttht bench load`. all, the default: core, then loader.
# The cheapest and most telling parts come first; each has a time limit of its own, one that fails leaves the others'
# results, and what no time is left for is skipped and said. Everything is written to ${OUT:-docs/results}/gpu-<which>.json, one object, the machine named.
# Ends with 0 if every part ran or was skipped with its reason, with 1 if one failed or ran out of time.
# Beside torch it needs numpy, pytest, rich, cyclopts, safetensors and simplejpeg, for the kernels cuda-core with NVRTC,
# and to measure loaders OpenCV and Pillow; hypothesis and scipy, where they are there, add tests. fasttht need not be
# installed. tests/bench/test_bare_machine.py holds that nothing else is asked for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
OUT="${OUT:-docs/results}"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
# Seconds for all parts together, and how few of them are not worth starting a part for.
BUDGET=520
LEAST=15
failed=0
number=0

# Not installed: folders of links make the one package that an installation would. Without it the repository's own
# folder would be found first, and has no fasttht/kernels.
find_package() {
  if "$PYTHON" -c 'import fasttht.kernels' 2>/dev/null; then
    return
  fi
  mkdir -p "$WORK/site/fasttht"
  ln -s "$PWD"/fasttht/* "$PWD/kernels" "$PWD/pipelines" "$WORK/site/fasttht/"
  export PYTHONSAFEPATH=1 PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
}

has_cuda() {
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

folder_of() {
  printf '%s/%02d' "$WORK" "$1"
}

# part NAME SECONDS COMMAND...: runs it under a time limit and keeps its exit code, its time and the last of its words.
part() {
  local name="$1" limit="$2" code=0 start=$SECONDS left folder
  shift 2
  left=$((BUDGET - SECONDS))
  if [ "$left" -lt "$LEAST" ]; then
    skip "$name" "the parts before it took the $BUDGET seconds that there are"
    return
  fi
  [ "$limit" -le "$left" ] || limit="$left"
  number=$((number + 1))
  folder="$(folder_of "$number")"
  mkdir -p "$folder"
  echo "gpu_check: $name"
  timeout --kill-after=10 "$limit" "$@" >"$folder/words" 2>&1 || code=$?
  tail -n 25 "$folder/words" | cut -c1-400
  # Exit code 5 of pytest: no such test was found. It is said, and is no failure.
  if [ "$code" -eq 5 ] && [ "${name#tests}" != "$name" ]; then
    number=$((number - 1))
    skip "$name" "no test of it is marked gpu"
    return
  fi
  printf '%s\n' "$name" "$code" "$((SECONDS - start))" "$limit" >"$folder/part"
  if [ "$code" -ne 0 ]; then
    echo "gpu_check: $name: ended with $code$([ "$code" -ne 124 ] || echo ", out of its $limit s")"
    failed=1
  fi
}

# bench NAME SECONDS WORDS...: a part whose report is one line of JSON.
bench() {
  local name="$1" limit="$2"
  shift 2
  local report
  report="$(folder_of $((number + 1)))/report"
  part "$name" "$limit" "$PYTHON" -m fasttht bench "$@" --output "$report"
}

skip() {
  echo "gpu_check: skipped: $1; $2"
  local folder
  number=$((number + 1))
  folder="$(folder_of "$number")"
  mkdir -p "$folder"
  printf '%s\n' "$1" "$2" >"$folder/skipped"
}

core() {
  bench "kernels" 60 kernels --windows 5
  part "tests: attacks, kernels" 90 "$PYTHON" -m pytest -q --continue-on-collection-errors -m gpu tests/attacks tests/kernels "$@"
  bench "attack, batch 128" 90 attack --batch-size 128 --windows 3 --engines backward eager-batch eager folded fused
  bench "step" 75 step --batch-size 128 --windows 3 --replay 4
  bench "zeros" 30 zeros --batch-size 128
  part "tests: the rest" 60 "$PYTHON" -m pytest -q --continue-on-collection-errors -m gpu tests \
    --ignore tests/attacks --ignore tests/kernels --ignore tests/pipelines "$@"
  bench "attack, batch 256" 75 attack --batch-size 256 --windows 3 --engines backward eager folded fused
  # Last, because it compiles; torch's cache of it is on this machine and not in the repository.
  bench "attack, compiled and peers" 120 attack --batch-size 128 --windows 3 \
    --engines eager compiled torchattacks foolbox art
}

loader() {
  local cores counts=(1)
  cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)))')"
  if [ "$cores" -ge 8 ]; then
    counts+=(8)
  else
    skip "load with 8 workers" "there are $cores cores"
  fi
  part "tests: pipelines" 90 "$PYTHON" -m pytest -q --continue-on-collection-errors -m gpu tests/pipelines "$@"
  if "$PYTHON" -c 'import cv2, PIL' 2>/dev/null; then
    bench "load" 300 load --workers "${counts[@]}" --windows 5 --window-s 1
  else
    skip "load" "OpenCV or Pillow is not installed"
  fi
}

write_report() {
  mkdir -p "$OUT"
  "$PYTHON" - "$1" "$WORK" "$OUT/gpu-$1.json" <<'PYTHON'
import json
import sys
from pathlib import Path

which, work, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
try:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda}
except ImportError as error:
    machine = {"gpu": None, "torch": None, "cuda": None, "error": str(error)}
parts = []
for folder in sorted(work.glob("[0-9][0-9]")):
    if (folder / "skipped").exists():
        name, reason = (folder / "skipped").read_text().splitlines()[:2]
        parts.append({"name": name, "skipped": reason})
        continue
    name, code, seconds, limit = (folder / "part").read_text().splitlines()
    found = {"name": name, "exit": int(code), "seconds": int(seconds), "limit_s": int(limit)}
    if (folder / "report").exists():
        found["report"] = json.loads((folder / "report").read_text().splitlines()[-1])
    else:
        if (folder / "report.partial").exists():
            found["partial_report"] = json.loads((folder / "report.partial").read_text())
        found["words"] = (folder / "words").read_text(errors="replace").splitlines()[-5:]
    parts.append(found)
target.write_text(json.dumps({"gpu_check": which, "machine": machine, "parts": parts}) + "\n")
print(f"gpu_check: {target}")
PYTHON
}

which=all
case "${1:-}" in
  core | loader | all)
    which="$1"
    shift
    ;;
esac

find_package
if has_cuda; then
  [ "$which" = loader ] || core "$@"
  [ "$which" = core ] || loader "$@"
else
  [ "$which" = loader ] || skip "core" "torch finds no CUDA device"
  [ "$which" = core ] || skip "loader" "torch finds no CUDA device"
fi
write_report "$which"
exit "$failed"
