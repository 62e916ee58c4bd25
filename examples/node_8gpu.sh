#!/usr/bin/env bash
# Mid-training with the paper's settings on one machine with 8 GPUs.
#   MODEL=DIR DATA=FILES VALIDATION=FILES examples/node_8gpu.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${DATA:?parquet, jsonl or txt files with documents, or a directory of them}"
PYTHON="${PYTHON:-python}"

run=(
  recipe=midtrain
  model.path="$MODEL"
  data.train_files="$DATA"
  trainer.n_gpus_per_node=8
  trainer.nnodes=1
  trainer.max_actor_ckpt_to_keep=2
)
if [[ -n "${VALIDATION:-}" ]]; then
  run+=(data.val_files="$VALIDATION")
fi
run+=("$@")

"$PYTHON" -m refine_verl.doctor
"$PYTHON" -m refine_verl.plan "${run[@]}"
if [[ -z "${PLAN_ONLY:-}" ]]; then
  exec "$PYTHON" -m refine_verl.main "${run[@]}"
fi
