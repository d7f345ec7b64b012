#!/usr/bin/env bash
# Make the small base again, from nothing: speech, codec, random weights, training, judging. README.md tells how long it took.
#
#   bash examples/small_base/make.sh [WORK]       default: outputs/small_base
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=examples/small_base
work=${1:-outputs/small_base}

train() { # NAME: by NAME.yaml, whose files of outputs/small_base are those of $work
  sed "s|outputs/small_base|$work|" "$here/$1.yaml" >"$work/$1.yaml"
  ds-higgs train -c "$work/$1.yaml"
}

python $here/make_speech.py --out "$work/speech"
python $here/learn_codec.py --speech "$work/speech" --out "$work/codec"
python $here/make_base.py --codec "$work/codec" --out "$work/random"
train train
ds-higgs export "$work/run" --out "$work/base_1" --merge --precision bf16
train many_voices
ds-higgs export "$work/many_voices" --out "$work/base" --merge --precision bf16
rm "$work/base/README.md" "$work/base/NOTICE" # those of a model made from the released weights
python $here/judge.py "$work/base"
