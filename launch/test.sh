#!/usr/bin/env bash
# Make the test environment and run everything that needs no GPU: style, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-test
bash launch/install.sh "$venv" dev,codec,datasets
export PATH="$PWD/$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

ruff check .
ruff format --check .
mypy
# Compiled once here, so that tests running side by side do not compile it twice.
python -c "from ds_higgs import distributed; distributed.init_process_group(); distributed.destroy_process_group()"
exec python -m pytest -n 2 --dist worksteal -m "not gpu and not slow" -q "$@"
