#!/usr/bin/env bash
# Make the test environment and run everything that needs no GPU: style, types, tests. Arguments go to pytest.
#
#   bash launch/test.sh            all
#   bash launch/test.sh --fast     style, types and the quick unit tests
#   bash launch/test.sh --native   the comparison with transformers >= 5.3, whose environment it makes; once that is
#                                  there, a run of all compares too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-test
native=.venv-native
unset PYTHONDONTWRITEBYTECODE # else hundreds of processes compile the same modules
bash launch/install.sh "$venv" dev,datasets
if [[ ${1:-} == --native ]]; then
  shift
  bash launch/install_native.sh "$native"
  set -- tests/native "$@"
fi
if [[ -f $native/.installed ]]; then
  export DS_HIGGS_NATIVE_PYTHON=${DS_HIGGS_NATIVE_PYTHON:-$PWD/$native/bin/python}
fi
export PATH="$PWD/$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

exec python -m pytest -n 2 --dist loadgroup -m "not gpu and not slow" -q "$@"
