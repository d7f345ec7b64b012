#!/usr/bin/env bash
# From a fresh clone to a trained adapter: install, make a tiny base checkpoint, train it on the example voices with two
# CPU ranks (or every GPU there is), validate, export. A few minutes the first time, seconds when run again. Arguments go to
# `ds-higgs train`; VENV is the environment that is made and used (.venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=examples/voice_cloning/config.yaml

venv=${VENV:-$PWD/.venv}
bash launch/install.sh "$venv"
export PATH="$venv/bin:$PATH"
ranks=$(python -c "import torch; print(torch.cuda.device_count())")
if ((ranks == 0)); then
  ranks=2
  export DS_ACCELERATOR=cpu
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[[ -f outputs/tiny_base/config.json ]] || ds-higgs init-tiny outputs/tiny_base
ds-higgs prepare -c "$config"
bash launch/on_gpus.sh "$ranks" -c "$config" "$@"
rm -rf outputs/example_adapter
ds-higgs export outputs/example --out outputs/example_adapter
ds-higgs report outputs/example

VENV=$venv python - <<'SUMMARY'
import json
import os

lines = [json.loads(line) for line in open("outputs/example/metrics.jsonl")]
losses = [line["audio_loss"] for line in lines if line["event"] == "eval"]
print(f"""
validation audio loss: {losses[0]:.3f} before training, {losses[-1]:.3f} after
made:
  outputs/tiny_base         a tiny base checkpoint (random weights: it shows the way, it does not speak)
  outputs/example           the run: config.yaml, metrics.jsonl, checkpoints/, adapters/
  outputs/example_adapter   the adapter in PEFT format
  outputs/example/report.html   the run on one page: open it in a browser
next:
  source {os.environ["VENV"]}/bin/activate
  ds-higgs train --help                  every key, with its default
  bash launch/train_1gpu.sh --train_manifest train.json --val_manifest val.json --output_dir out \\
      --base_ckpt bosonai/higgs-audio-v2-generation-3B-base
""")
SUMMARY
