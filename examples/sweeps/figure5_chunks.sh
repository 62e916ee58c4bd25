#!/usr/bin/env bash
# Figure 5, right: c, the chunks of a document, in mid-training. LongBench at 16K.
#   MODEL=DIR DATA=FILES EVAL=DIR examples/sweeps/figure5_chunks.sh [KEY=VALUE ...]
set -euo pipefail

: "${MODEL:?a model directory or hub id, such as fla-hub/delta_net-1.3B-100B}"
: "${DATA:?parquet, jsonl or txt files with documents, or a directory of them}"
: "${EVAL:?the directory with benchmark data, see docs/evaluation.md}"
PYTHON="${PYTHON:-python}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$PYTHON" -m refine_verl.main -m recipe=midtrain \
  model.path="$MODEL" data.train_files="$DATA" \
  refine.nsp.chunks=8,2,4 "$@"

RUNS="${RUNS:-outputs/refine_verl}"
"$HERE/compare.sh" "$RUNS"/midtrain_refine.nsp.chunks={8,2,4}
