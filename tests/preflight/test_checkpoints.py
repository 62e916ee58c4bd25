"""Which checkpoint a run goes on from, and when it is refused, from the files alone."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from reference.crafted import craft
from reference.saving import save
from reference.toy import tiny_config

from refine_verl.config import ConfigError
from refine_verl.preflight.checkpoints import check_checkpoint, checkpoint_to_resume
from refine_verl.record.checkpoint_files import MANIFEST, flushed


def a_run(directory: Path, **trainer: Any) -> DictConfig:
    values = {
        "default_local_dir": str(directory),
        "resume_mode": "auto",
        "resume_from_path": None,
        "n_gpus_per_node": 2,
        "nnodes": 1,
        **trainer,
    }
    contents = ["model", "optimizer", "extra"]
    actor = {"checkpoint": {"load_contents": contents}}
    return OmegaConf.create({"trainer": values, "actor_rollout_ref": {"actor": actor}})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two workers at step 4, as verl leaves it, next to an older one."""
    for step in (2, 4):
        actor = tmp_path / f"global_step_{step}" / "actor"
        (actor / "huggingface").mkdir(parents=True)
        (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
        tiny_config("delta_net").save_pretrained(actor / "huggingface")
        for rank in range(2):
            for name in ("model", "optim", "extra_state"):
                torch.save({}, actor / f"{name}_world_size_2_rank_{rank}.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    return tmp_path


def refusal(config: DictConfig, **model: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check_checkpoint(config, tiny_config("delta_net", **model))
    return str(error.value)


def test_a_fitting_checkpoint_is_resumed(saved: Path) -> None:
    model = tiny_config("delta_net")
    assert check_checkpoint(a_run(saved), model) == saved / "global_step_4"
    older = str(saved / "global_step_2")
    named = a_run(saved, resume_mode="resume_path", resume_from_path=older)
    assert check_checkpoint(named, model) == saved / "global_step_2"


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_a_checkpoint_that_cannot_be_checked_is_used_with_a_warning(
    saved: Path, tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """verl's own have no manifest, ours may have lost it."""
    folder = saved / "global_step_4"
    config = a_run(saved, resume_mode=mode, resume_from_path=str(folder))
    assert checkpoint_to_resume(config, warn=False) == folder and caplog.text == ""
    assert checkpoint_to_resume(config) == folder
    assert f"the checkpoint {folder} has no {MANIFEST}: " in caplog.text and "cannot be checked" in caplog.text
    caplog.clear()
    folder = save(tmp_path / "ours", 4)
    assert checkpoint_to_resume(a_run(folder.parent, resume_mode=mode, resume_from_path=str(folder))) == folder
    assert caplog.text == ""


def test_a_fresh_run_has_no_checkpoint(tmp_path: Path, saved: Path) -> None:
    model = tiny_config("delta_net", hidden_size=64)
    assert check_checkpoint(a_run(tmp_path / "elsewhere"), model) is None
    assert check_checkpoint(a_run(saved, resume_mode="disable"), model) is None


@pytest.mark.parametrize(("workers", "nodes"), [(1, 1), (4, 1), (2, 2)])
def test_another_number_of_workers(saved: Path, workers: int, nodes: int) -> None:
    said = refusal(a_run(saved, n_gpus_per_node=workers, nnodes=nodes))
    assert said.startswith(f"trainer.n_gpus_per_node: this run has {workers * nodes} worker(s)")
    assert "global_step_4 was written by 2" in said and "resume_mode=disable" in said


def test_one_node_or_two_is_no_difference(saved: Path) -> None:
    config = a_run(saved, n_gpus_per_node=1, nnodes=2)
    assert check_checkpoint(config, tiny_config("delta_net")) == saved / "global_step_4"


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"hidden_size": 64}, "hidden_size=64 instead of 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3 instead of 2"),
        ({"vocab_size": 64}, "vocab_size=64 instead of 61"),
        ({"qk_activation": "relu"}, "qk_activation=relu instead of silu"),
    ],
)
def test_another_model(saved: Path, change: dict[str, Any], shown: str) -> None:
    said = refusal(a_run(saved), **change)
    assert said.startswith("model: ") and shown in said and "global_step_4" in said


def test_another_family(saved: Path) -> None:
    with pytest.raises(ConfigError, match="model_type=gated_deltanet instead of delta_net"):
        check_checkpoint(a_run(saved), tiny_config("gated_deltanet"))


def test_what_is_not_the_model_may_change(saved: Path) -> None:
    model = tiny_config("delta_net", eos_token_id=7, use_cache=False, initializer_range=0.5)
    assert check_checkpoint(a_run(saved), model) is not None


@pytest.mark.parametrize("name", ["optim", "extra_state"])
def test_what_was_not_saved_cannot_be_loaded(saved: Path, name: str) -> None:
    for rank in range(2):
        (saved / "global_step_4" / "actor" / f"{name}_world_size_2_rank_{rank}.pt").unlink()
    said = refusal(a_run(saved))
    assert f"has no {name}_world_size_2_rank_0.pt" in said and "load_contents" in said and "resume_from_path" in said
    weights_only = a_run(saved)
    weights_only.actor_rollout_ref.actor.checkpoint.load_contents = ["model"]
    assert check_checkpoint(weights_only, tiny_config("delta_net")) is not None


FILES = [f"actor/{name}_world_size_2_rank_1.pt" for name in ("model", "optim", "extra_state")] + ["data.pt"]


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_could_run_code_is_refused(saved: Path, name: str) -> None:
    """Also with a manifest that fits: who can write a shard can write that."""
    folder = saved / "global_step_4"
    craft(folder / name, saved / "the_code_was_run")
    files = {str(path.relative_to(folder)): flushed(path) for path in folder.rglob("*") if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"files": {key: record._asdict() for key, record in files.items()}}))
    said = refusal(a_run(saved))
    assert said.startswith(f"trainer.resume_mode: {name} of the checkpoint {folder} is not read: it needs posix.mkdir")
    assert "resume_from_path" in said and "resume_mode=disable" in said
    assert not (saved / "the_code_was_run").exists()


def test_what_is_not_loaded_is_not_asked_for(saved: Path) -> None:
    craft(saved / "global_step_4" / FILES[1], saved / "the_code_was_run")
    config = a_run(saved)
    config.actor_rollout_ref.actor.checkpoint.load_contents = ["model"]
    assert check_checkpoint(config, tiny_config("delta_net")) is not None


@pytest.mark.parametrize("content", ["[1]", "null", "3"])
@pytest.mark.parametrize("name", ["fsdp_config.json", "huggingface/config.json"])
def test_notes_that_are_no_objects(saved: Path, name: str, content: str) -> None:
    (saved / "global_step_4" / "actor" / name).write_text(content)
    said = refusal(a_run(saved))
    assert str(saved / "global_step_4" / "actor" / name) in said and "is no object" in said


def cut_a_shard(folder: Path) -> None:
    file = folder / "actor" / "optim_world_size_2_rank_1.pt"
    file.write_bytes(file.read_bytes()[:-10])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut_a_shard, "optim_world_size_2_rank_1.pt is cut short"),
    "missing": (
        lambda f: (f / "actor/model_world_size_2_rank_1.pt").unlink(),
        "model_world_size_2_rank_1.pt is missing",
    ),
    "torn notes": (lambda f: (f / "actor/fsdp_config.json").write_text("{ torn"), "fsdp_config.json"),
    "no notes": (lambda f: (f / "actor/huggingface/config.json").unlink(), "huggingface/config.json"),
    "gone": (shutil.rmtree, "no such directory"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(saved: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """With a warning that names both and the reason; if none is left the run does not silently start over."""
    harm, reason = DAMAGES[case]
    harm(saved / "global_step_4")
    with caplog.at_level(logging.WARNING, logger="refine_verl"):
        assert check_checkpoint(a_run(saved), tiny_config("delta_net")) == saved / "global_step_2"
        assert caplog.text == ""  # said once, by the run itself
        assert checkpoint_to_resume(a_run(saved)) == saved / "global_step_2"
    assert "global_step_4 is damaged" in caplog.text and reason in caplog.text
    assert f"resumes from {saved / 'global_step_2'} instead" in caplog.text
    harm(saved / "global_step_2")
    said = refusal(a_run(saved))
    assert said.startswith("trainer.default_local_dir: no checkpoint of") and reason in said
    assert "global_step_4" in said and "resume_mode=disable" in said
    assert "global_step_2" in said or case == "gone"
    # the cure
    assert checkpoint_to_resume(a_run(saved, resume_mode="disable")) is None


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(saved: Path) -> None:
    cut_a_shard(saved / "global_step_4")
    named = a_run(saved, resume_mode="resume_path", resume_from_path=str(saved / "global_step_4"))
    said = refusal(named)
    assert said.startswith("trainer.resume_from_path: the checkpoint") and "is cut short" in said


@pytest.mark.parametrize("tracker", ["6", "", "four"])
def test_a_tracker_that_names_no_checkpoint(saved: Path, tracker: str) -> None:
    """verl would start from the beginning and overwrite what is there."""
    (saved / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert checkpoint_to_resume(a_run(saved)) == saved / "global_step_4"
    for step in (2, 4):
        shutil.rmtree(saved / f"global_step_{step}")
    assert refusal(a_run(saved)).startswith("trainer.default_local_dir: no checkpoint of")


def test_wrong_ways_to_ask(saved: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'auto'"):
        checkpoint_to_resume(a_run(saved, resume_mode="automatic"))
    for path in (None, str(saved), "global_step_9"):
        with pytest.raises(ConfigError, match="trainer.resume_from_path: "):
            checkpoint_to_resume(a_run(saved, resume_mode="resume_path", resume_from_path=path))
