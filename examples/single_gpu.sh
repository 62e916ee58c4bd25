#!/usr/bin/env bash
# Mid-training of a 1.3B DeltaNet on one GPU.
#   MODEL=DIR DATA=FILES examples/single_gpu.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${DATA:?parquet, jsonl or txt files with documents, or a directory of them}"
PYTHON="${PYTHON:-python}"

# A batch of 16 documents in two mini-batches, one document per pass: activations of 16K tokens are recomputed.
run=(
  recipe=midtrain
  model.path="$MODEL"
  data.train_files="$DATA"
  data.train_batch_size=16
  refine.ppo_mini_batch_size=8
  model.activation_checkpointing=layer
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1
  trainer.n_gpus_per_node=1
  trainer.nnodes=1
  trainer.max_actor_ckpt_to_keep=2
  "$@"
)

"$PYTHON" -m refine_verl.doctor
"$PYTHON" -m refine_verl.plan "${run[@]}"
if [[ -z "${PLAN_ONLY:-}" ]]; then
  exec "$PYTHON" -m refine_verl.main "${run[@]}"
fi
