#!/usr/bin/env bash
# Make a virtual environment and install ds_higgs with everything it needs; quick where that is done already.
#
#   bash launch/install.sh [VENV] [EXTRAS]       default: .venv, no extras; EXTRAS: dev, datasets, liger, nf4, wandb
#
# PYTHON: the interpreter (python3). TORCH: what to install as torch (a build that fits the driver); torch is left alone
# where VENV has one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
extras=${2:-}
python=${PYTHON:-python3}
read -ra torch <<<"${TORCH:-$(bash launch/choose_torch.sh)}"

# Quick where an earlier run installed the same, with these extras or more.
state=$(cat pyproject.toml launch/install.sh | cksum)
if [[ -f $venv/.installed && $(<"$venv/.installed") == "$state"*"$extras"* ]]; then
  exit 0
fi

"$python" - <<'CHECK'
import sys
if sys.version_info < (3, 10):
    sys.exit(f"Python {sys.version.split()[0]} found, 3.10 or newer expected (set PYTHON=...)")
CHECK

echo "installing into $venv"
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install -q)
# What is imported is compiled then, unless that is kept from being written: most modules never are.
[[ -n ${PYTHONDONTWRITEBYTECODE:-} ]] || pip+=(--no-compile)
# torch first and alone: the other packages then take the one that is there.
"$venv/bin/python" -c "import torch" 2>/dev/null || "${pip[@]}" "${torch[@]}"
"${pip[@]}" -e ".${extras:+[$extras]}"
# Declared dependencies of these would replace torch and break transformers.
"${pip[@]}" --no-deps boson-multimodal==0.1.1 descript-audio-codec==1.0.0 descript-audiotools==0.7.2
echo "$state $extras" >"$venv/.installed"
