"""Directories built once: written beside their place, moved there whole, found again by a key."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from refine_verl.config import DataError

logger = logging.getLogger(__name__)

_BUILDING = ".building-"
_ABANDONED_AFTER_SECONDS = 24 * 3600


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/refine_verl/data`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "refine_verl" / "data"


def make_key(payload: Any) -> str:
    """Name of a cache entry: 20 hex digits that depend on every value in `payload` (json-serialisable)."""
    text = json.dumps(payload, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def cached_directory(parent: Path, name: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """Return `parent/name`, building it first where it is missing.

    `build` fills an empty directory beside the final place, which is then renamed: what exists under its
    final name is complete, whoever was killed while building. Two processes may build the same entry at
    once; the first to finish wins and the other's work is thrown away.

    Returns:
        The directory, and whether it was there already.

    Raises:
        DataError: the cache directory cannot be written.
    """
    final = parent / name
    if final.is_dir():
        return final, True
    created = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise DataError(
            f"data.cache_dir={parent} cannot be used: {error}. Set data.cache_dir to a directory you may write to."
        ) from error
    _remove_abandoned(parent)
    building = Path(tempfile.mkdtemp(prefix=f"{_BUILDING}{name}-", dir=parent))
    try:
        build(building)
        building.chmod(0o755)
        try:
            building.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        with suppress(OSError):
            for directory in created:  # innermost first, as long as they are empty
                directory.rmdir()
        raise
    shutil.rmtree(building, ignore_errors=True)
    return final, False


def _remove_abandoned(parent: Path) -> None:
    """Delete what killed processes left, once nothing in it has changed for a day."""
    limit = time.time() - _ABANDONED_AFTER_SECONDS
    for directory in parent.glob(f"{_BUILDING}*"):
        try:
            newest = max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))
        except OSError:  # its owner is moving it into place
            continue
        if newest < limit:
            logger.info("removing an unfinished cache entry: %s", directory)
            shutil.rmtree(directory, ignore_errors=True)
