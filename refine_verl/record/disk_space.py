"""What is free on a disk, and whether an error of writing says that it is full. Loads no torch, ray or verl."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from refine_verl.record.checkpoint_files import CheckpointError

_GIB = 1 << 30
_OF_TORCH = ("inline_container.cc", "PytorchStreamWriter")


class DiskFullError(CheckpointError):
    """The file system has no room for what is to be written."""


def free_space(place: Path) -> str:
    """``0.12 GiB are free in PLACE``, or in the nearest directory above it that exists."""
    place = existing(place)
    return f"{shutil.disk_usage(place).free / _GIB:.2f} GiB are free in {place}"


def could_not_write(error: BaseException, place: Path, needed: int, writer: str = "") -> CheckpointError:
    """What to raise for an error of writing: a `DiskFullError` if that is why. What the library says comes last.

    Args:
        error: of the operating system, torch or safetensors.
        place: where was written, there or not.
        needed: bytes that were to be written, at least.
        writer: who wrote; begins the message.
    """
    kind = DiskFullError if disk_is_full(error, place, needed) else CheckpointError
    return kind(f"{writer}{free_space(place)}; {type(error).__name__}: {error}")


def disk_is_full(error: BaseException, place: Path, needed: int) -> bool:
    """Whether an error of writing to ``place`` says that its file system is full.

    torch says only that fewer bytes arrived than it wrote, whatever the reason: then it is full if there is less room
    than ``needed``.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    text = str(error)
    if "No space left on device" in text:  # an exception of safetensors' own
        return True
    short = isinstance(error, RuntimeError) and any(name in text for name in _OF_TORCH)
    return short and shutil.disk_usage(existing(place)).free < needed


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def existing(place: Path) -> Path:
    """The place itself, or the nearest directory above it that exists."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def same_file_system(place: Path, other: Path) -> bool:
    """Whether two places that exist share their free space."""
    return place.stat().st_dev == other.stat().st_dev
