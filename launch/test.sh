#!/usr/bin/env bash
# Make the test environment and run everything that needs no GPU: style, types, tests. Arguments go to pytest.
#
#   bash launch/test.sh          all
#   bash launch/test.sh --fast   style, types and the quick unit tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-test
# Python compiles what is imported, and nobody waits for the rest.
PIP_NO_COMPILE=1 bash launch/install.sh "$venv" dev,datasets
export PATH="$PWD/$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

exec python -m pytest -n 2 --dist loadgroup -m "not gpu and not slow" -q "$@"
