#!/usr/bin/env bash
# Join the Ray cluster at $RAY_HEAD as one node.
#
# Workers of one machine (docker compose up --scale worker=3) are all given all its GPUs. With GPUS_PER_WORKER=G the i-th
# of them takes GPUs (i-1)*G to i*G-1 for itself; empty: all. i comes from the name Compose gives containers
# (project-worker-3), or from WORKER_INDEX.
set -euo pipefail

RAY_HEAD="${RAY_HEAD:?the address of the head, such as head:6379}"
GPUS_PER_WORKER="${GPUS_PER_WORKER:-}"

worker_index() {
  if [[ -n "${WORKER_INDEX:-}" ]]; then
    echo "$WORKER_INDEX"
    return
  fi
  local name
  name="$(getent hosts "$(hostname -i)" | awk '{print $2}')"
  name="${name%%.*}"
  if [[ ! "$name" =~ -([0-9]+)$ ]]; then
    echo "error: cannot tell which worker this is from its name '$name'; set WORKER_INDEX=1, 2, ..." >&2
    return 1
  fi
  echo "${BASH_REMATCH[1]}"
}

if [[ -n "$GPUS_PER_WORKER" ]]; then
  index="$(worker_index)"
  first=$(((index - 1) * GPUS_PER_WORKER))
  CUDA_VISIBLE_DEVICES="$(seq --separator=, "$first" $((first + GPUS_PER_WORKER - 1)))"
  export CUDA_VISIBLE_DEVICES
  echo "worker $index: GPUs $CUDA_VISIBLE_DEVICES"
fi
exec ray start --address="$RAY_HEAD" --disable-usage-stats --block
