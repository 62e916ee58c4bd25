#!/usr/bin/env bash
# Figures 4 and E.1: next-token accuracy and loss on validation documents while mid-training, three trials each.
#   MODEL=DIR DATA=FILES VALIDATION=FILES examples/sweeps/figure4_trials.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${DATA:?parquet, jsonl or txt files with documents, or a directory of them}"
: "${VALIDATION:?documents for validation; the paper uses BookSum}"
PYTHON="${PYTHON:-python}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$PYTHON" -m refine_verl.main -m recipe=sft,midtrain \
  model.path="$MODEL" data.train_files="$DATA" data.val_files="$VALIDATION" \
  data.seed=1,2,3 trainer.test_freq=10 "$@"

# The curves: val/ntp_accuracy and val/ntp_loss.
RUNS="${RUNS:-outputs/refine_verl}"
"$PYTHON" -m refine_verl.report "$RUNS"/{sft,midtrain}_data.seed={1,2,3}
