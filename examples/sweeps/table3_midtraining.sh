#!/usr/bin/env bash
# Tables 3, 5 and E.1: mid-training with the next-token loss and with REFINE, as many optimiser steps each, and the
# model before it. Needles, LongBench and short-context tasks.
#   MODEL=DIR DATA=FILES EVAL=DIR examples/sweeps/table3_midtraining.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${DATA:?parquet, jsonl or txt files with documents, or a directory of them}"
: "${EVAL:?the directory with benchmark data, see docs/evaluation.md}"
PYTHON="${PYTHON:-python}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$PYTHON" -m refine_verl.main -m recipe=sft,midtrain \
  model.path="$MODEL" data.train_files="$DATA" "$@"

RUNS="${RUNS:-outputs/refine_verl}"
TASKS=ruler_niah,longbench,short_context LENGTHS=4096,8192,16384 BASE="$MODEL" \
  "$HERE/compare.sh" "$RUNS"/{sft,midtrain}
# Rows 4 and 5 of Table 5: the same models with test-time training.
for ttt in sft refine; do
  TTT=$ttt NO_REPORT=1 "$HERE/compare.sh" "$RUNS"/{sft,midtrain}
done
"$PYTHON" -m refine_verl.evaluate compare "$RUNS"/{sft,midtrain}/evaluation_ttt_{none,sft,refine}
