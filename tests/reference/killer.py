"""A package for `actor_rollout_ref.model.external_lib`: worker 1 dies in the middle of writing a checkpoint.

Environment: DIE_AT, steps like "6,8", each once; DIE_NOTES, a directory that remembers which of them are done.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import torch

_save = torch.save


def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    _save(content, file, *args, **kwargs)
    found = re.search(r"global_step_(\d+)/actor/optim_world_size_2_rank_1\.pt$", str(file))
    if found is None or found[1] not in os.environ.get("DIE_AT", "").split(","):
        return
    note = Path(os.environ["DIE_NOTES"]) / found[1]
    if not note.exists():
        note.touch()
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


torch.save = save
