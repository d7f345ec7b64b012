#!/usr/bin/env bash
# Make the test environment and run everything that needs no GPU: style, types, tests. Arguments go to pytest.
#
#   bash launch/test.sh          all
#   bash launch/test.sh --fast   style, types and the quick unit tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-test
bash launch/install.sh "$venv" dev,datasets
export PATH="$PWD/$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Compiled once, so that tests running side by side do not compile it twice. Nothing to do where it has been.
python -c "from ds_higgs.job import distributed as d; d.init_process_group(); d.destroy_process_group()"
exec python -m pytest -n 2 --dist loadgroup -m "not gpu and not slow" -q "$@"
