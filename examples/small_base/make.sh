#!/usr/bin/env bash
# Make the small base again, from nothing: speech, codec, random weights, training, judging. README.md tells how long it took.
#
#   bash examples/small_base/make.sh [WORK]       default: outputs/small_base
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=examples/small_base
work=${1:-outputs/small_base}

source_of() { # NAME WEIGHT: a source of a mixture
  echo "{manifest: $work/speech/$1.json, weight: $2, name: $1}"
}

python $here/make_speech.py --out "$work/speech"
python $here/learn_codec.py --speech "$work/speech" --out "$work/codec"
python $here/make_base.py --codec "$work/codec" --out "$work/random"
ds-higgs train -c $here/train.yaml --model.base "$work/random" --run.output_dir "$work/run" \
  --data.train_manifest "$work/speech/train.json" --data.val_manifest "$work/speech/val.json"
ds-higgs export "$work/run" --out "$work/base_1" --merge --precision bf16
val="[{manifest: $work/speech/val.json}]"
ds-higgs train -c $here/many_voices.yaml --model.base "$work/base_1" --run.output_dir "$work/many_voices" --data.val "$val" \
  --data.train "[$(source_of train 0.35), $(source_of varied 0.25), $(source_of voices 0.4)]"
ds-higgs export "$work/many_voices" --out "$work/base" --merge --precision bf16
rm "$work/base/README.md" "$work/base/NOTICE" # those of a model made from the released weights
python $here/judge.py "$work/base"
