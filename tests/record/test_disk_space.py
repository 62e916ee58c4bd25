"""Which errors of writing mean a full disk, and what is said of them."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference.saving import save

from refine_verl.record import disk_space
from refine_verl.record.checkpoint_files import CheckpointError
from refine_verl.record.disk_space import DiskFullError, could_not_write, disk_is_full, size
from refine_verl.trainer.saving import CheckpointingTrainer
from refine_verl.workers.snapshot import shard_bytes
from refine_verl.workers.worker import NSPRolloutWorker

TORCH = "[enforce fail at inline_container.cc:672] . unexpected pos 255936 vs 255828"
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_free(count: int) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: SimpleNamespace(free=count))

    set_free(1000)
    return set_free


@pytest.mark.parametrize(
    ("error", "needed", "full"),
    [
        (NO_SPACE, 1, True),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), 1, True),
        (RuntimeError(TORCH), 1001, True),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), 1001, True),
        (RuntimeError(TORCH), 1000, False),  # there was room: something else
        (OSError(errno.EIO, "Input/output error"), 1001, False),
        (RuntimeError("CUDA out of memory"), 1001, False),
        (ValueError(TORCH), 1001, False),
    ],
)
def test_what_means_a_full_disk(free: Any, tmp_path: Path, error: Exception, needed: int, full: bool) -> None:
    assert disk_is_full(error, tmp_path / "not" / "there", needed) == full


def engine() -> Any:
    """With 15 parameters of 4 bytes and AdamW's two moments for each."""
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(4)).sum().backward()
    optimizer.step()
    return SimpleNamespace(rank=1, module=module, optimizer=optimizer)


def test_a_worker_knows_what_its_checkpoint_takes() -> None:
    moments, steps = 2 * 15 * 4, 2 * 4
    assert shard_bytes(engine()) == 15 * 4 + moments + steps


def of_a_worker(tmp_path: Path, error: Exception) -> CheckpointError:
    with (
        pytest.raises(CheckpointError) as raised,
        NSPRolloutWorker._writing(SimpleNamespace(engine=engine()), str(tmp_path)),  # type: ignore[arg-type]
    ):
        raise error
    return pickle.loads(pickle.dumps(raised.value))


def said(tmp_path: Path, cause: BaseException) -> str:
    return CheckpointingTrainer._could_not_save(SimpleNamespace(run_dir=tmp_path, global_steps=12), cause)  # type: ignore[arg-type]


def test_a_full_disk_is_said_first_then_the_cure_and_the_library_last(free: Any, tmp_path: Path) -> None:
    free(100)
    earlier = save(tmp_path, 11)
    error = of_a_worker(tmp_path, RuntimeError(TORCH))
    assert isinstance(error, DiskFullError)
    begins = (
        f"the file system of {tmp_path} is full: the checkpoint of step 12 could not be written. Free some space, or "
        "keep fewer checkpoints with trainer.max_actor_ckpt_to_keep; "
    )
    message = said(tmp_path, error)
    assert message.startswith(f"{begins}{earlier} is whole, and the same command resumes from it (rank 1 on ")
    assert message.endswith(f"0.00 GiB are free in {tmp_path}; RuntimeError: {TORCH})")
    assert said(tmp_path, NO_SPACE).startswith(begins) and "(the driver: " in said(tmp_path, NO_SPACE)


def test_a_disk_with_room_is_not_called_full(free: Any, tmp_path: Path) -> None:
    error = of_a_worker(tmp_path, RuntimeError(TORCH))
    message = said(tmp_path, error)
    assert not isinstance(error, DiskFullError) and "is full" not in message
    assert message.startswith(f"the checkpoint of step 12 could not be written to {tmp_path} (rank 1 on ")
    assert "there is no earlier checkpoint" in message


def test_the_same_goes_for_the_model(tmp_path: Path) -> None:
    def export(_: str) -> None:
        raise DiskFullError("rank 0 on a: 0.00 GiB are free in b; Error: c")

    for name in ("model", "adapter"):
        workers = SimpleNamespace(export=export, save_adapter=export)
        trainer = SimpleNamespace(run_dir=tmp_path, _result=tmp_path / name, actor_rollout_wg=workers)
        with pytest.raises(CheckpointError, match=f"^the file system of .* is full: the trained {name} .*; Error: c"):
            CheckpointingTrainer._export(trainer)  # type: ignore[arg-type]


def test_what_a_worker_said_is_asked_again_with_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    """A worker may look at the free space after another has removed its own part."""
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "shard.pt").write_bytes(b"1" * 5)
    (tmp_path / "data.pt").write_bytes(b"1" * 3)
    assert size(tmp_path) == 8
    short = RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
    said = could_not_write(short, tmp_path, 1, "rank 0 on host: ")
    assert not isinstance(said, DiskFullError)
    assert disk_is_full(RuntimeError(said), tmp_path, 1 << 60) and not disk_is_full(RuntimeError(said), tmp_path, 1)
