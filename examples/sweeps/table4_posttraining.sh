#!/usr/bin/env bash
# Table 4, rows 4 to 8: post-training on the answers, nested SFT and nested REFINE, then test-time training of the last.
# MODEL is a mid-trained model; RULER QA.
#   MODEL=DIR DATA=FILES EVAL=DIR examples/sweeps/table4_posttraining.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${DATA:?training rows with prompts and answers, see docs/data.md}"
: "${EVAL:?the directory with benchmark data, see docs/evaluation.md}"
PYTHON="${PYTHON:-python}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$PYTHON" -m refine_verl.main -m recipe=posttrain_sft,posttrain_nested_sft,posttrain \
  model.path="$MODEL" data.train_files="$DATA" "$@"

RUNS="${RUNS:-outputs/refine_verl}"
export TASKS=ruler_qa LENGTHS=4096,8192,16384
"$HERE/compare.sh" "$RUNS"/{posttrain_sft,posttrain_nested_sft,posttrain}
for ttt in sft refine; do
  TTT=$ttt NO_REPORT=1 "$HERE/compare.sh" "$RUNS"/posttrain
done
"$PYTHON" -m refine_verl.evaluate compare "$RUNS"/posttrain/evaluation_ttt_{none,sft,refine}
