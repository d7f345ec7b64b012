#!/usr/bin/env bash
# Train on the 8 GPUs of one machine. Arguments go to `ds-higgs train`:
#
#   bash launch/train_8xh200.sh -c config.yaml
#   bash launch/train_8xh200.sh --train_manifest train.json --output_dir out --base_ckpt BASE --batch_size 2 --grad_accum 8
#
# A run that was stopped goes on when the same command is given again.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/on_gpus.sh" 8 "$@"
