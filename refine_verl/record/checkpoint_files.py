"""Checkpoints on disk: written to a hidden directory, renamed into place, checked before use, removed when too many.

A checkpoint is a directory ``global_step_N`` in verl's layout with a manifest, written last, that has the size and a
checksum of every other file. Names that begin with a dot are work in progress; :func:`tidy` removes them. Loads no
torch, ray or verl.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from refine_verl.config import RunFailed
from refine_verl.record.files import write_atomically

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's note of the last complete checkpoint of a run directory."""
STEP = "global_step_"

_SAVING, _REPLACED, _REMOVED = ".saving_", ".replaced_", ".removed_"
_CHUNK = 1 << 22


class CheckpointError(RunFailed):
    """A checkpoint or the final model could not be written; those written before are as they were."""


class FileRecord(NamedTuple):
    """What the manifest says of a file. ``sha256``: in hexadecimal."""

    bytes: int
    sha256: str


def flushed(file: Path) -> FileRecord:
    """Size and checksum of a file, which is on disk, not only in memory, when this returns.

    Raises:
        OSError: the disk, the quota or the network file system refuses what it had taken before.
    """
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return FileRecord(os.fstat(stream.fileno()).st_size, _sha256(stream))


def _sha256(stream: BinaryIO) -> str:
    checksum = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        checksum.update(chunk)
    return checksum.hexdigest()


def _crc32(stream: BinaryIO) -> int:
    checksum = 0
    while chunk := stream.read(_CHUNK):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


_CHECKSUMS: dict[str, Callable[[BinaryIO], str | int]] = {"sha256": _sha256, "crc32": _crc32}
"""By their name in a manifest; those of earlier versions have the second."""


# Writing


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """An empty directory beside the checkpoints, to write the one of ``step`` into."""
    folder = being_saved(_checkpoint(run_dir, step))
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def commit_checkpoint(run_dir: Path, step: int, files: Mapping[str, FileRecord]) -> Path:
    """Make what was written since :func:`begin_checkpoint` the last checkpoint of the run.

    A kill at any moment leaves the checkpoints before, and this one either whole or not at all. A checkpoint of the
    same step is replaced.

    Args:
        run_dir: the run directory.
        step: its number.
        files: every file by its path in the checkpoint.

    Raises:
        CheckpointError: a file is not there, or shorter than its writer says.
        OSError: the disk.
    """
    final = _checkpoint(run_dir, step)
    folder = being_saved(final)
    for name, record in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != record.bytes:
            raise CheckpointError(
                f"{file} was written by a worker but cannot be seen, or not whole, where the command runs. The run "
                "directory (trainer.default_local_dir) must be shared by all nodes"
            )
    manifest = {"step": step, "files": {name: record._asdict() for name, record in sorted(files.items())}}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for directory in {folder, *((folder / name).parent for name in files)}:
        _flush_directory(directory)
    put_in_place(folder, final)
    write_atomically(run_dir / TRACKER, str(step))
    return final


def put_in_place(folder: Path, final: Path) -> None:
    """Rename a finished directory to ``final`` beside it, in place of what is there."""
    replaced = _move_aside(final, _REPLACED)
    os.replace(folder, final)
    _flush_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _move_aside(folder: Path, prefix: str) -> Path:
    """Rename a directory that may be there, so that it is never taken for a checkpoint while it is being removed."""
    aside = folder.with_name(f"{prefix}{folder.name}")
    if aside.exists():
        shutil.rmtree(aside)
    if folder.exists():
        os.replace(folder, aside)
    return aside


def being_saved(final: Path) -> Path:
    """Where to write what :func:`put_in_place` then renames to ``final``."""
    return final.with_name(f"{_SAVING}{final.name}")


def retain(run_dir: Path, newest: int, keep: int | None) -> list[int]:
    """Remove checkpoints of earlier steps until ``keep`` are left; returns the steps removed.

    Goes by what is on disk, not by what this process wrote. Damaged checkpoints are not counted, so that ``keep`` of
    them can be loaded. Checkpoints of later steps, left by an attempt that continued differently, are not touched.

    Args:
        run_dir: the run directory.
        newest: the step just saved; always stays.
        keep: None: all.
    """
    if keep is None:
        return []
    kept, removed = 0, []
    for step in steps_of(run_dir):
        if step > newest:
            continue
        folder = _checkpoint(run_dir, step)
        if step == newest or (kept < keep and damage(folder, checksums=False) is None):
            kept += 1
            continue
        shutil.rmtree(_move_aside(folder, _REMOVED), ignore_errors=True)
        removed.append(step)
    return removed


def tidy(run_dir: Path) -> None:
    """Remove unfinished files of an interrupted attempt. No other attempt may be running."""
    if not run_dir.is_dir():
        return
    for replaced in run_dir.glob(f"{_REPLACED}*"):
        final = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if not final.exists():  # interrupted between the two renames
            os.replace(replaced, final)
    for prefix in (_SAVING, _REPLACED, _REMOVED):
        for folder in run_dir.glob(f"{prefix}*"):
            shutil.rmtree(folder, ignore_errors=True)
    for file in run_dir.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush files only
            raise
    finally:
        os.close(descriptor)


# Reading


def steps_of(run_dir: Path) -> list[int]:
    """Steps of all checkpoints of a run directory, whole or not, the latest first."""
    names = (folder.name.removeprefix(STEP) for folder in run_dir.glob(f"{STEP}*") if folder.is_dir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def tracked_step(run_dir: Path) -> int | None:
    """The step the run directory names as its last; None if it names none or cannot be read."""
    try:
        text = (run_dir / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def candidates(run_dir: Path) -> list[Path]:
    """Checkpoints a run may resume from, the best first: the one its tracker names, then those before it.

    Without a tracker that can be read: all. Without any tracker: those with a manifest, which were complete when the
    first attempt was interrupted.
    """
    tracked = tracked_step(run_dir)
    found = [(step, _checkpoint(run_dir, step)) for step in steps_of(run_dir)]
    if tracked is not None:
        first = _checkpoint(run_dir, tracked)
        replaced = first.with_name(f"{_REPLACED}{first.name}")  # put back by `tidy` when the run starts
        newest = replaced if replaced.is_dir() and not first.is_dir() else first
        return [newest, *(folder for step, folder in found if step < tracked)]
    unreadable = (run_dir / TRACKER).exists()
    return [folder for _, folder in found if unreadable or (folder / MANIFEST).is_file()]


def _checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / f"{STEP}{step}"


def damage(folder: Path, *, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint, None if every file is as it was written.

    Args:
        folder: ``global_step_N``.
        checksums: read all of it; otherwise look at names and sizes only.

    One without a manifest, written by verl itself, is held to what verl's own notes in it say.
    """
    if not folder.is_dir():
        return "there is no such directory"
    if not (folder / MANIFEST).is_file():
        return next(_problems_without_manifest(folder), None)
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        files = {str(name): _listed(record) for name, record in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if not files:
        return f"{MANIFEST} names no files"
    with ThreadPoolExecutor(max_workers=8) as pool:  # checksums leave the interpreter's lock alone
        for content in (False, True) if checksums else (False,):  # names and sizes of all files take no time
            problems = pool.map(partial(_problem, folder, content), files.items())
            if problem := next(filter(None, problems), None):
                return problem
    return None


class _Listed(NamedTuple):
    """A file in a manifest: ``kind`` is the name of its checksum."""

    bytes: int
    kind: str
    checksum: str | int


def _listed(record: Mapping[str, Any]) -> _Listed:
    kind = "crc32" if "crc32" in record and "sha256" not in record else "sha256"
    return _Listed(int(record["bytes"]), kind, record[kind])


def _problem(folder: Path, content: bool, entry: tuple[str, _Listed]) -> str | None:
    name, record = entry
    file = folder / name
    try:
        state = file.stat()
        if state.st_size != record.bytes:
            return f"{name} has {state.st_size:,} bytes instead of {record.bytes:,}"
        if content and _checksum(str(file), state.st_size, state.st_mtime_ns, record.kind) != record.checksum:
            return f"{name} has other content than was written (its checksum is wrong)"
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None


@lru_cache(maxsize=4096)
def _checksum(file: str, size: int, changed: int, kind: str) -> str | int:
    """Read once per process: a run is checked before Ray starts, and again when it does."""
    with open(file, "rb") as stream:
        return _CHECKSUMS[kind](stream)


def _problems_without_manifest(folder: Path) -> Iterator[str]:
    actor = folder / "actor"
    for name in ("fsdp_config.json", "huggingface/config.json"):
        try:
            notes: Any = json.loads((actor / name).read_text())
        except (OSError, ValueError) as error:
            yield f"actor/{name}: {getattr(error, 'strerror', None) or error}"
            continue
        if name == "fsdp_config.json" and isinstance(notes, dict):
            yield from _problems_of_shards(actor, notes.get("world_size"))
    data = folder / "data.pt"
    if data.exists() and not zipfile.is_zipfile(data):
        yield "data.pt is cut short"


def _problems_of_shards(actor: Path, ranks: Any) -> Iterator[str]:
    kinds = {
        match[1] for file in actor.glob("*.pt") if (match := re.match(r"(.+)_world_size_\d+_rank_\d+\.pt", file.name))
    }
    if not kinds:
        yield "it has no shards"
    for kind in sorted(kinds):
        for rank in range(ranks if isinstance(ranks, int) else 0):
            file = actor / f"{kind}_world_size_{ranks}_rank_{rank}.pt"
            if not file.is_file():
                yield f"actor/{file.name} is missing"
            elif not zipfile.is_zipfile(file):  # what torch.save writes ends with a table of its contents
                yield f"actor/{file.name} is cut short"
