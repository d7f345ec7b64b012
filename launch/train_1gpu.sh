#!/usr/bin/env bash
# Train on one GPU. Arguments go to `ds-higgs train`:
#
#   bash launch/train_1gpu.sh -c config.yaml
#   bash launch/train_1gpu.sh --train_manifest train.json --output_dir out --base_ckpt BASE --batch_size 2 --lr 1e-4
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/on_gpus.sh" 1 "$@"
