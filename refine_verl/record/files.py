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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; the file there replaces ``path`` at the end of the ``with`` block, once it is on disk.

    A reader, or a kill, finds the old or the new content, never a part. The old content stays if the block raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file in one step, as :func:`replacing` does; text is written as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


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
        file.close()  # its holder removed it after we opened it and before we locked it


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
