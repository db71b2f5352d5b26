#!/usr/bin/env bash
# A trained sentence encoder learns to answer questions; then it loses half, and four fifths, of its
# FFN channels while it learns on as long as its dense twin. Prints exact match and F1 on the English
# part of XQuAD, size, and latency at 1 x 384, each of the model as it was saved and loaded again.
#
#     examples/question_answering/run_qa.sh [FOLDER] [KEY=VALUE ...]
#
# FOLDER (out/question_answering) takes the four models, which a second call does not train again.
# Keys of the recipe are set anew in all runs, such as seed=1.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-$root/out/question_answering}
recipe=$root/configs/squad_sentence_encoder.toml
settings=("${@:2}")

run() { # name, settings...
  local name=$1
  shift
  [ -f "$out/$name/report.json" ] && return
  printf '\n--- %s\n' "$name"
  local all=("$@" ${settings[@]+"${settings[@]}"})
  flaxslim run "$recipe" --out "$out/$name" "${all[@]/#/--set=}"
}

# All of them begin with the same dense model, and learn from it.
run start train.dense_steps=0 pruning.sparsity=0 distillation.weight=0 train.steps=560
for sparsity in 0 0.5 0.8; do
  run "sparsity-$sparsity" "model.source=$out/start" train.dense_steps=0 \
    "pruning.sparsity=$sparsity" evaluation.dense=false
done
python "$here/table.py" "$out"/sparsity-*
