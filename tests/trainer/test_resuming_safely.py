"""Each kind of file of a checkpoint is read as data, by the worker or by the driver."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from reference.crafted import craft
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

from refine_verl.record.checkpoint_files import begin_checkpoint, commit_checkpoint, flushed
from refine_verl.trainer.refine_trainer import RefineTrainer
from refine_verl.workers.engine import RefineEngine

SHARDS = ("model", "optim", "extra_state")
Resume = Callable[[], None]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RefineEngine:
    """One rank with verl's own checkpoint manager, and no process group."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    engine = object.__new__(RefineEngine)
    engine._is_offload_param = engine._is_offload_optimizer = False
    engine.checkpoint_manager = FSDPCheckpointManager(model, optimizer, schedule)
    return engine


@pytest.fixture
def checkpoint(tmp_path: Path, engine: RefineEngine) -> Path:
    """Step 2 of a run, not yet in place."""
    folder = begin_checkpoint(tmp_path, 2)
    (folder / "actor").mkdir()
    manager = engine.checkpoint_manager
    extra = {"lr_scheduler": manager.lr_scheduler.state_dict(), "rng": BaseCheckpointManager.get_rng_state()}
    states = dict(zip(SHARDS, (manager.model.state_dict(), manager.optimizer.state_dict(), extra), strict=True))
    for name, state in states.items():
        torch.save(state, folder / "actor" / f"{name}_world_size_1_rank_0.pt")
    torch.save({"position": 3}, folder / "data.pt")
    return folder


@pytest.fixture
def resume(tmp_path: Path, engine: RefineEngine) -> Resume:
    """What the driver does, with a worker in this process."""
    trainer: Any = object.__new__(RefineTrainer)
    section = {"resume_mode": "auto", "resume_from_path": None, "default_local_dir": str(tmp_path)}
    trainer.config = OmegaConf.create({"trainer": {**section, "del_local_ckpt_after_load": False}})
    trainer.run_dir, trainer.use_critic, trainer.trainer_mode = tmp_path, False, "sync"
    trainer.actor_rollout_wg = engine
    trainer.train_dataloader = types.SimpleNamespace(load_state_dict=lambda state: setattr(trainer, "place", state))

    def run() -> None:
        trainer._load_checkpoint()
        assert trainer.global_steps == 2 and trainer.place == {"position": 3}
        assert trainer.config.trainer.resume_mode == "auto"

    return run


def in_place(folder: Path) -> None:
    """With a manifest that fits, as who can write there would make it."""
    files = {str(path.relative_to(folder)): flushed(path) for path in folder.rglob("*") if path.is_file()}
    commit_checkpoint(folder.parent, 2, files)


def test_what_a_run_has_saved_is_read(checkpoint: Path, resume: Resume) -> None:
    in_place(checkpoint)
    resume()


@pytest.mark.parametrize("name", [*(f"actor/{name}_world_size_1_rank_0.pt" for name in SHARDS), "data.pt"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, checkpoint: Path, resume: Resume, name: str) -> None:
    craft(checkpoint / name, tmp_path / "the_code_was_run")
    in_place(checkpoint)
    with pytest.raises(UnpicklingError, match=r"posix\.mkdir"):
        resume()
    assert not (tmp_path / "the_code_was_run").exists()
