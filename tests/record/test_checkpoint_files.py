"""Checkpoints as files: whole or not there, checked, counted, and what an interruption leaves. Kills for real."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from reference.runs import ROOT, environment
from reference.saving import SHARD, save

from refine_verl.record import checkpoint_files
from refine_verl.record.checkpoint_files import (
    MANIFEST,
    TRACKER,
    CheckpointError,
    FileRecord,
    begin_checkpoint,
    being_saved,
    candidates,
    commit_checkpoint,
    damage,
    put_in_place,
    retain,
    steps_of,
    tidy,
)


def hidden(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob(".*"))


def test_a_checkpoint_appears_whole_with_its_manifest_and_the_note(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    assert folder == tmp_path / "global_step_4" and (tmp_path / TRACKER).read_text() == "4"
    assert damage(folder) is None and hidden(tmp_path) == []
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["step"] == 4 and set(manifest["files"]) == {SHARD, "data.pt"}
    content = (folder / SHARD).read_bytes()
    assert manifest["files"][SHARD] == {"bytes": 5000, "sha256": hashlib.sha256(content).hexdigest()}


def test_a_manifest_of_an_earlier_version_is_still_good(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    content = {name: (folder / name).read_bytes() for name in (SHARD, "data.pt")}
    files = {name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in content.items()}
    (folder / MANIFEST).write_text(json.dumps({"step": 4, "files": files}))
    assert damage(folder) is None
    flip_a_bit(folder)
    found = damage(folder)
    assert found is not None and SHARD in found and "other content than was written" in found


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 4)
    folder = save(tmp_path, 4, b"again")
    assert (folder / SHARD).read_bytes() == b"again" and damage(folder) is None and hidden(tmp_path) == []


def test_what_a_worker_wrote_elsewhere_is_no_checkpoint(tmp_path: Path) -> None:
    """Nodes that do not share the run directory."""
    save(tmp_path, 2)
    begin_checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"must be shared by all nodes"):
        commit_checkpoint(tmp_path, 4, {SHARD: FileRecord(5000, "")})
    assert steps_of(tmp_path) == [2] and (tmp_path / TRACKER).read_text() == "2"


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, 4000)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[2500] ^= 1
    (folder / SHARD).write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "has 4,000 bytes instead of 5,000"),
    "one bit": (flip_a_bit, "other content than was written"),
    "missing file": (lambda folder: (folder / "data.pt").unlink(), "data.pt: No such file"),
    "torn manifest": (lambda folder: os.truncate(folder / MANIFEST, 20), "manifest.json cannot be read"),
    "other manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
    "manifest of nothing": (lambda folder: (folder / MANIFEST).write_text('{"files": {}}'), "names no files"),
    "no directory": (shutil.rmtree, "no such directory"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, case: str) -> None:
    folder = save(tmp_path, 4)
    assert damage(folder) is None
    harm, said = DAMAGES[case]
    harm(folder)
    found = damage(folder)
    assert found is not None and said in found
    # sizes alone do not show a bit
    assert (damage(folder, checksums=False) is None) == (case == "one bit")


def test_content_is_read_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 4)
    checkpoint_files._checksum.cache_clear()
    damage(folder)
    before = checkpoint_files._checksum.cache_info().misses
    assert before == 2 and damage(folder) is None
    assert checkpoint_files._checksum.cache_info().misses == before
    flip_a_bit(folder)
    os.utime(folder / SHARD, ns=(1, 1))
    assert damage(folder) is not None  # a file that changed is read again


def verls(run_dir: Path, step: int, ranks: int = 2) -> Path:
    """As verl itself leaves it: no manifest."""
    actor = run_dir / f"global_step_{step}" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "fsdp_config.json").write_text(json.dumps({"world_size": ranks}))
    (actor / "huggingface" / "config.json").write_text("{}")
    for rank in range(ranks):
        torch.save({"a": torch.zeros(9)}, actor / f"model_world_size_{ranks}_rank_{rank}.pt")
    return actor.parent


def test_a_checkpoint_without_a_manifest_is_held_to_verls_notes(tmp_path: Path) -> None:
    folder = verls(tmp_path, 3)
    assert damage(folder) is None
    shard = folder / "actor" / "model_world_size_2_rank_1.pt"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-30])
    assert damage(folder) == "actor/model_world_size_2_rank_1.pt is cut short"
    shard.unlink()
    assert damage(folder) == "actor/model_world_size_2_rank_1.pt is missing"


def test_the_candidates_are_the_tracked_step_and_those_before_it(tmp_path: Path) -> None:
    assert candidates(tmp_path) == []
    for step in (2, 10, 4):
        save(tmp_path, step)  # the note says 4: somebody went back
    assert [folder.name for folder in candidates(tmp_path)] == ["global_step_4", "global_step_2"]
    (tmp_path / TRACKER).write_text("to")  # torn: all
    assert [folder.name for folder in candidates(tmp_path)] == ["global_step_10", "global_step_4", "global_step_2"]
    (tmp_path / TRACKER).unlink()  # killed before the first note: those that are known to be whole
    verls(tmp_path, 12)
    assert [folder.name for folder in candidates(tmp_path)] == ["global_step_10", "global_step_4", "global_step_2"]


def test_retention_goes_by_what_is_there(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    assert retain(tmp_path, 8, None) == []
    assert retain(tmp_path, 8, 2) == [4, 2] and steps_of(tmp_path) == [8, 6]
    assert hidden(tmp_path) == []


def test_retention_counts_what_can_be_loaded(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    truncate(tmp_path / "global_step_6")
    assert retain(tmp_path, 8, 2) == [6, 2] and steps_of(tmp_path) == [8, 4]
    # a step that is done again after going back: later steps of the other branch are left alone
    save(tmp_path, 5)
    assert retain(tmp_path, 5, 1) == [4] and steps_of(tmp_path) == [8, 5]


def test_leftovers_are_removed_and_a_half_replaced_checkpoint_is_put_back(tmp_path: Path) -> None:
    save(tmp_path, 2)
    begin_checkpoint(tmp_path, 4)
    (tmp_path / f".{TRACKER}.123.tmp").write_text("4")
    os.replace(tmp_path / "global_step_2", tmp_path / ".replaced_global_step_2")  # killed between two renames
    assert [folder.name for folder in candidates(tmp_path)] == [".replaced_global_step_2"]
    tidy(tmp_path)
    assert hidden(tmp_path) == [] and damage(tmp_path / "global_step_2") is None
    tidy(tmp_path / "nowhere")


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for content in ("one", "two"):
        folder = being_saved(final)
        folder.mkdir()
        (folder / content).write_text(content)
        put_in_place(folder, final)
    assert [path.name for path in final.iterdir()] == ["two"] and hidden(tmp_path) == []


def test_a_kill_at_any_moment_leaves_one_that_can_be_loaded(tmp_path: Path) -> None:
    """A process that does nothing but save, replace and remove checkpoints is killed again and again."""
    rng = random.Random(0)
    leftovers, last = 0, 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-m", "reference.saving", str(tmp_path)],
            env=environment(),
            cwd=ROOT,
        )
        try:
            deadline = time.monotonic() + 120
            while (checkpoint_files.tracked_step(tmp_path) or 0) < last + 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(rng.random() * 0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        leftovers += bool(hidden(tmp_path))
        good = [folder for folder in candidates(tmp_path) if damage(folder) is None]
        assert good, sorted(path.name for path in tmp_path.iterdir())
        last = checkpoint_files.tracked_step(tmp_path) or 0
    assert leftovers, "no kill hit a checkpoint being written"
