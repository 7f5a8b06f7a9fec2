#!/usr/bin/env bash
# Runs every check on this machine: bash tools/test.sh
# With arguments only the tests they select, and no lint: bash tools/test.sh -k bank
# Settings from the environment: see setup.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

install_system_packages() {
  local missing=()
  command -v g++ >/dev/null || missing+=(g++)
  command -v pkg-config >/dev/null || missing+=(pkg-config)
  pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
  pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
  "$VENV_PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing+=("$("$VENV_PYTHON" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')")
  ((${#missing[@]} == 0)) || install_debian "ffcv builds from source" "${missing[@]}"
}

install() {
  say "installing into $VENV what the tests need: some minutes and 3 GB the first time, skipped the next"
  install_system_packages
  ensure_torch
  # DALI runs on the CPU, and NVRTC compiles the kernels, without a driver.
  pip_install "fasttht, its test tools, DALI, NVRTC and what evaluation, plots and export need" -c "$VENV/constraints.txt" -e ".[test,dali,cuda12,eval,plots,onnx]"
  # ffcv declares opencv-python, whose files would overwrite those of opencv-python-headless, and a handful of
  # packages that only its benchmarks import. What "import ffcv" does import beside ours is on the next line.
  pip_install "ffcv's dependencies" -c "$VENV/constraints.txt" numba tqdm setuptools
  pip_install "ffcv (built from source)" -c "$VENV/constraints.txt" --no-deps ffcv
  # Without their dependencies: torchvision would replace torch by the one it was built with, and torchattacks
  # wants a requests of 2020.
  pip_install "what the other attacks import" -c "$VENV/constraints.txt" eagerpy GitPython requests
  pip_install "torchvision and other attacks (only tests use them)" -c "$VENV/constraints.txt" --no-deps \
    torchvision torchattacks foolbox
}

say "fasttht: every check (ruff, mypy, pytest), in $VENV"
make_venv
once test install
if (($# == 0)); then
  say "ruff"
  "$VENV/bin/ruff" check --quiet .
  "$VENV/bin/ruff" format --check --quiet .
fi
say "pytest${*:+ $*}"
# A process for each core; the tests of a file stay together, for they share what it has trained.
(($#)) || set -- -n "$(nproc)" --dist loadfile
exec "$VENV/bin/pytest" "$@"
