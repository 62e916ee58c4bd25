"""Small checkpoints, and a process that does nothing but save, replace and remove them. Loads no torch."""

from __future__ import annotations

import sys
from pathlib import Path

from refine_verl.record.checkpoint_files import (
    begin_checkpoint,
    commit_checkpoint,
    flushed,
    retain,
    tidy,
    tracked_step,
)

SHARD = "actor/model_world_size_1_rank_0.pt"


def save(run_dir: Path, step: int, content: bytes | None = None) -> Path:
    """A checkpoint of two files."""
    folder = begin_checkpoint(run_dir, step)
    (folder / "actor").mkdir()
    (folder / SHARD).write_bytes(content or bytes([step % 256]) * 5000)
    (folder / "data.pt").write_bytes(b"data")
    return commit_checkpoint(run_dir, step, {name: flushed(folder / name) for name in (SHARD, "data.pt")})


def save_for_ever(run_dir: Path) -> None:
    """Each step twice; one checkpoint is kept."""
    tidy(run_dir)
    step = tracked_step(run_dir) or 0
    while True:
        step += 1
        for fill in (step % 256, step % 255):
            save(run_dir, step, bytes([fill]) * 300_000)
        retain(run_dir, step, 1)


if __name__ == "__main__":
    save_for_ever(Path(sys.argv[1]))
