# shellcheck shell=bash
# Sourced by demo.sh and test.sh: a virtual environment with torch in it, on a machine that may have neither.
#
# PYTHON=/path/to/python3     the interpreter to build on; default: the first one >= 3.11 on PATH
# FASTTHT_VENV=/path/to/venv  the virtual environment; default: .venv in the repository
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are respected.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -ms "${FASTTHT_VENV:-$ROOT/.venv}")
VENV_PYTHON=$VENV/bin/python

say() { printf -- '-- %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# quietly COMMAND...: silent when it works, everything it said when it does not.
quietly() {
  local log status=0
  log=$(mktemp)
  "$@" >"$log" 2>&1 || status=$?
  ((status == 0)) || cat "$log" >&2
  rm -f "$log"
  return "$status"
}

# install_debian REASON PACKAGE...: as root, or through a sudo that asks for no password.
install_debian() {
  local reason=$1 as_root=()
  shift
  command -v apt-get >/dev/null ||
    die "$reason: expected these packages (Debian's names): $*, got a machine without apt-get; install them by hand"
  if [[ $(id -u) != 0 ]]; then
    sudo -n true 2>/dev/null ||
      die "$reason: expected Debian packages that are not installed: $*; run: sudo apt-get install $*"
    as_root=(sudo -n)
  fi
  say "installing Debian packages ($reason): $*"
  quietly "${as_root[@]}" apt-get update -qq || say "apt-get update failed; going on with the package lists that are here"
  quietly "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" ||
    die "$reason: expected apt-get to install $*; the lines above say why it did not"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

version_of() { { command -v "$1" >/dev/null && "$1" --version 2>&1; } || echo "does not run"; }

choose_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_new_enough "$PYTHON" ||
      die "PYTHON: expected Python >= 3.11, got $PYTHON ($(version_of "$PYTHON")); point it at another one"
    return
  fi
  # A version manager's shim is on PATH and yet refuses to run: asking the version finds that out.
  for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
    if is_new_enough "$candidate"; then
      PYTHON=$candidate
      return
    fi
  done
  die "python: expected Python >= 3.11 on PATH, got none; install one or set PYTHON=/path/to/python3"
}

has_venv_module() { "$PYTHON" -c 'import ensurepip, venv' >/dev/null 2>&1; }

make_venv() {
  if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    choose_python
    if ! has_venv_module; then
      # Debian ships these two modules in a package of their own.
      install_debian "virtual environments" "$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
      has_venv_module || die "$PYTHON: expected the modules venv and ensurepip, got neither; set PYTHON to another one"
    fi
    say "making the virtual environment $VENV with $(version_of "$PYTHON")"
    quietly "$PYTHON" -m venv "$VENV" || die "$VENV: expected a new virtual environment; the lines above say why there is none"
  fi
  is_new_enough "$VENV_PYTHON" ||
    die "$VENV: expected Python >= 3.11, got $(version_of "$VENV_PYTHON"); remove it or set FASTTHT_VENV to another path"
}

# pip_install WHAT ARGUMENT...
pip_install() {
  local what=$1
  shift
  say "installing $what"
  quietly "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input "$@" ||
    die "$VENV: expected pip to install $what; the lines above say why it did not"
}

# Any torch that imports is kept: it may be the one build that fits this machine. Whatever torch it is, the
# constraints that later installs use name that version, so that no later install replaces it.
ensure_torch() {
  local capability
  if ! "$VENV_PYTHON" -c 'import torch' >/dev/null 2>&1; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true)
    if grep -q '^7\.[0-4]' <<<"$capability"; then
      # 2.10 is the last default build with Volta (sm_70) in it; 7.5 (Turing) is still in the later ones.
      pip_install "torch 2.10 (this GPU has compute capability 7.0)" "torch==2.10.*"
    else
      # Never without the constraints: an unpinned torch can differ from the tested one by gigabytes.
      pip_install "torch" -c "$ROOT/constraints.txt" torch
    fi
  fi
  grep -v '^torch==' "$ROOT/constraints.txt" >"$VENV/constraints.txt"
  "$VENV_PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >>"$VENV/constraints.txt"
}

# once NAME COMMAND...: skip COMMAND when it has already succeeded here, for these very files.
once() {
  local stamp=$VENV/.fasttht-$1 key
  shift
  key=$({
    echo "$ROOT"
    "$VENV_PYTHON" -VV
    cat "$ROOT"/{pyproject.toml,constraints.txt} "$ROOT"/tools/{setup,demo,test}.sh
  } | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then return; fi
  "$@"
  echo "$key" >"$stamp"
}
