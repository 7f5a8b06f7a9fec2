#!/usr/bin/env bash
# Installs fasttht into .venv and trains on the data that comes with it: bash tools/demo.sh
# Arguments go to the training command: bash tools/demo.sh --epochs 4
# Settings from the environment: see setup.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install() {
  say "installing torch and fasttht into $VENV: one to three minutes the first time, skipped the next"
  ensure_torch
  # Editable: in the repository root an installed copy would be shadowed by the folder of the same name.
  pip_install "fasttht" -c "$VENV/constraints.txt" -e "$ROOT"
}

make_venv
once demo install
say "fasttht train --replay 4${*:+ $*}"
"$VENV/bin/fasttht" train --replay 4 "$@"
say "next: . $VENV/bin/activate, then fasttht --help"
