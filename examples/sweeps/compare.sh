#!/usr/bin/env bash
# Runs on one page, then their models on benchmarks, each beside the first.
#   EVAL=DIR [TASKS=longbench] [LENGTHS=16384] [TTT=none] [BASE=MODEL] examples/sweeps/compare.sh RUN [RUN ...]
# BASE: a model from before training, to be put first. NO_REPORT=1: benchmarks only.
set -euo pipefail

: "${EVAL:?the directory with benchmark data, see docs/evaluation.md}"
PYTHON="${PYTHON:-python}"
TASKS="${TASKS:-longbench}"
LENGTHS="${LENGTHS:-16384}"
TTT="${TTT:-none}"

evaluate() { # MODEL OUT
  "$PYTHON" -m refine_verl.evaluate model="$1" tasks="$TASKS" lengths="$LENGTHS" ttt="$TTT" data_dir="$EVAL" out="$2"
}

if [[ -z "${NO_REPORT:-}" ]]; then
  "$PYTHON" -m refine_verl.report "$@"
fi
results=()
if [[ -n "${BASE:-}" ]]; then
  results+=(results/base)
  evaluate "$BASE" results/base
fi
for run in "$@"; do
  results+=("$run/evaluation_ttt_$TTT")
  evaluate "$run/model" "$run/evaluation_ttt_$TTT"
done
if ((${#results[@]} > 1)); then
  "$PYTHON" -m refine_verl.evaluate compare "${results[@]}"
fi
