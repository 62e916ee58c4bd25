#!/usr/bin/env bash
# Table E.2: the reward of test-time training, on rows of a benchmark.
# MODEL is a mid-trained model; PROMPTS: LongBench as `python -m refine_verl.prepare longbench` writes it.
#   MODEL=DIR PROMPTS=FILES examples/sweeps/tableE2_ttt_reward.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${PROMPTS:?rows of test prompts with answers, see docs/data.md}"
PYTHON="${PYTHON:-python}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$PYTHON" -m refine_verl.main -m recipe=ttt \
  model.path="$MODEL" data.val_files="$PROMPTS" \
  refine.nsp.reward=binary,cosine "$@"
"$PYTHON" -m refine_verl.main recipe=ttt_sft model.path="$MODEL" data.val_files="$PROMPTS" "$@"

# Scores before and after adaptation are in the runs' last lines of metrics.jsonl and on this page.
RUNS="${RUNS:-outputs/refine_verl}"
"$PYTHON" -m refine_verl.report "$RUNS"/ttt_refine.nsp.reward={binary,cosine} "$RUNS"/ttt_sft
