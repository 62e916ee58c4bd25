#!/usr/bin/env bash
# Not in the paper: n rollouts per position, which forking makes cheap, compared within the document or within the
# position, with and without division by the group's standard deviation. LongBench at 16K.
#   MODEL=DIR DATA=FILES EVAL=DIR examples/sweeps/groups.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${DATA:?parquet, jsonl or txt files with documents, or a directory of them}"
: "${EVAL:?the directory with benchmark data, see docs/evaluation.md}"
PYTHON="${PYTHON:-python}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$PYTHON" -m refine_verl.main -m recipe=midtrain \
  model.path="$MODEL" data.train_files="$DATA" \
  refine.nsp.rollouts_per_position=4,8,16 refine.nsp.group=sequence,position \
  algorithm.norm_adv_by_std_in_grpo=true,false "$@"

RUNS="${RUNS:-outputs/refine_verl}"
"$HERE/compare.sh" "$RUNS"/midtrain_refine.nsp.rollouts_per_position={4,8,16}_refine.nsp.group={sequence,position}_algorithm.norm_adv_by_std_in_grpo={True,False}
