#!/usr/bin/env bash
# Start a training with `deepspeed` on COUNT GPUs of this machine: of those that CUDA_VISIBLE_DEVICES names, if it is set.
#
#   CUDA_VISIBLE_DEVICES=3 bash launch/on_gpus.sh 1 -c config.yaml
#
# `deepspeed --num_gpus` would begin at GPU 0 whatever CUDA_VISIBLE_DEVICES says, and `--include` takes numbers alone.
# LAUNCHER_LOG_LEVEL=info shows what the launcher does.
set -euo pipefail
count=${1:?number of GPUs}
shift
devices=(--num_gpus "$count")

fail() {
  echo "$1" >&2
  exit 2
}

number_of() { # a GPU's number, of a number or the beginning of its name
  [[ $1 =~ ^[0-9]+$ ]] && echo "$1" && return
  nvidia-smi --query-gpu=index,uuid --format=csv,noheader | awk -F', ' -v name="$1" 'index($2, name) == 1 {print $1}'
}

if [[ -n ${CUDA_VISIBLE_DEVICES+set} && ${DS_ACCELERATOR:-} != cpu ]]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
  if [[ -z ${visible[0]:-} || ${visible[0]} == -1 ]]; then
    export DS_ACCELERATOR=cpu # deepspeed would show the ranks GPU 0 again
  elif command -v nvidia-smi >/dev/null; then
    ((${#visible[@]} >= count)) || fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#visible[@]}, expected $count GPUs"
    numbers=()
    for device in "${visible[@]:0:count}"; do
      number=$(number_of "$device")
      [[ $number =~ ^[0-9]+$ ]] || fail "CUDA_VISIBLE_DEVICES: $device is no GPU of nvidia-smi; expected a number or a GPU's UUID"
      [[ $number == "$device" ]] || export CUDA_DEVICE_ORDER=PCI_BUS_ID # how nvidia-smi counts
      numbers+=("$number")
    done
    devices=(--include "localhost:$(IFS=, && echo "${numbers[*]}")")
    unset CUDA_VISIBLE_DEVICES # deepspeed would say that it ignores it
  fi
fi
exec deepspeed --log_level "${LAUNCHER_LOG_LEVEL:-error}" "${devices[@]}" --master_port "${MASTER_PORT:-29500}" --module ds_higgs train "$@"
