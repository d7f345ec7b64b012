#!/usr/bin/env bash
# Train on several machines, started once on each of them (no ssh between them is needed):
#
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash launch/train_multinode.sh -c config.yaml
#
# The manifest, the base checkpoint, the output folder and data.cache_dir must be on a file system that all of them see.
set -euo pipefail
: "${NODES:?number of machines}" "${NODE_RANK:?this machine, from 0}" "${MASTER_ADDR:?address of machine 0}"
exec torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "${GPUS_PER_NODE:-8}" \
  --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" -m ds_higgs train "$@"
