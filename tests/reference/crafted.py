"""Files whose pickle runs code where it is read: what somebody can put into a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class MakesDirectory:
    """Reading its pickle makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def craft(file: Path, marker: Path) -> None:
    """A file of `torch.save` that makes the directory `marker` where it is read without care."""
    torch.save({"state": MakesDirectory(marker)}, file)
