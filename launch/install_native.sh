#!/usr/bin/env bash
# Make the environment of tests/native: transformers >= 5.3, which boson_multimodal excludes, and nothing of ours; quick
# where that is done already.
#
#   bash launch/install_native.sh [VENV]       default: .venv-native
#
# PYTHON, TORCH: as of launch/install.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv-native}
python=${PYTHON:-python3}
state=$(cksum <launch/install_native.sh)
if [[ -f $venv/.installed && $(<"$venv/.installed") == "$state" ]]; then
  exit 0
fi

echo "installing into $venv"
read -ra torch <<<"${TORCH:-$(bash launch/choose_torch.sh)}"
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install -q)
"$venv/bin/python" -c "import torch" 2>/dev/null || "${pip[@]}" "${torch[@]}"
"${pip[@]}" "transformers>=5.3" peft soundfile
echo "$state" >"$venv/.installed"
