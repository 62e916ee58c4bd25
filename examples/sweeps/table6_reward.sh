#!/usr/bin/env bash
# Table 6: the reward of mid-training (hybrid is not in the table). LongBench at 16K.
#   MODEL=DIR DATA=FILES EVAL=DIR examples/sweeps/table6_reward.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${DATA:?parquet, jsonl or txt files with documents, or a directory of them}"
: "${EVAL:?the directory with benchmark data, see docs/evaluation.md}"
PYTHON="${PYTHON:-python}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$PYTHON" -m refine_verl.main -m recipe=midtrain \
  model.path="$MODEL" data.train_files="$DATA" \
  refine.nsp.reward=cosine,binary,hybrid "$@"

RUNS="${RUNS:-outputs/refine_verl}"
"$HERE/compare.sh" "$RUNS"/midtrain_refine.nsp.reward={cosine,binary,hybrid}
