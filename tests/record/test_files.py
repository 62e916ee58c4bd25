"""Locks and replaced files: who is refused, what is left behind."""

import errno
import subprocess
import sys

import pytest

from refine_verl.record import files
from refine_verl.record.files import AlreadyLockedError, locked, replacing, write_atomically

HOLD = """
import sys
from pathlib import Path
from refine_verl.record.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_for_one_process_and_is_given_back_where_that_is_killed(tmp_path):
    path = tmp_path / ".lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(AlreadyLockedError), locked(path):
            pytest.fail("entered a held lock")
        process.kill()
        process.wait(60)
        assert path.exists()  # left by the one that was killed
        with locked(path):
            pass
    assert not path.exists()


def test_what_the_body_raises_stays_what_it_is(tmp_path):
    with pytest.raises(BlockingIOError, match="its own"), locked(tmp_path / ".lock"):
        raise BlockingIOError("its own")
    assert not (tmp_path / ".lock").exists()


def test_a_lock_file_removed_while_it_was_being_locked_is_made_anew(tmp_path, monkeypatch):
    path, calls = tmp_path / ".lock", []

    def flock(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            path.unlink()  # its holder leaves between our opening and our locking

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(path):
        assert path.exists()
        assert len(calls) == 2


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_file_systems_without_locks_are_warned_of(tmp_path, monkeypatch, caplog, code):
    def flock(file, operation):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(tmp_path / ".lock"):
        assert (tmp_path / ".lock").exists()
    assert f"{tmp_path}: this file system has no locks" in caplog.text


def test_other_errors_of_locking_are_raised(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"), locked(tmp_path / ".lock"):
        pytest.fail("entered")


def test_a_file_that_cannot_be_replaced_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def fsync(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("new")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
