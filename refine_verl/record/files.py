"""Files that several processes may want, or that a kill may cut short."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader, or a kill, finds the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class AlreadyLockedError(Exception):
    """Another process holds a lock file."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` inside a ``with`` block; a process that dies lets go of it.

    Where the file system knows no locks (Lustre mounted without ``flock``), a warning takes the lock's place.

    Raises:
        AlreadyLockedError: another process holds it.
        OSError: it cannot be made.
    """
    with _open_locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_locked(path: Path) -> TextIO:
    while True:
        file = path.open("w")
        try:
            _lock(file, path)
        except BaseException:
            file.close()
            raise
        if _is_still_at(path, file):
            return file
        file.close()  # who held it removed it between our opening and our locking


def _lock(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise AlreadyLockedError(path) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks; let no second process work there", path.parent)


def _is_still_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
