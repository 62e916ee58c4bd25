"""Which checkpoint a run goes on from, and when it is refused, from the files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from reference.toy import tiny_config

from refine_verl.config import ConfigError
from refine_verl.trainer.checkpoints import check_checkpoint, checkpoint_to_resume


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
                (actor / f"{name}_world_size_2_rank_{rank}.pt").touch()
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


@pytest.mark.parametrize("name", ["model", "optim", "extra_state"])
def test_a_missing_shard(saved: Path, name: str) -> None:
    (saved / "global_step_4" / "actor" / f"{name}_world_size_2_rank_1.pt").unlink()
    said = refusal(a_run(saved))
    assert f"{name}_world_size_2_rank_1.pt is missing" in said and "resume_from_path" in said
    weights_only = a_run(saved)
    weights_only.actor_rollout_ref.actor.checkpoint.load_contents = ["model"]
    if name != "model":
        assert check_checkpoint(weights_only, tiny_config("delta_net")) is not None


@pytest.mark.parametrize("content", [None, "{ torn"])
def test_unreadable_notes(saved: Path, content: str | None) -> None:
    file = saved / "global_step_4" / "actor" / "fsdp_config.json"
    file.unlink() if content is None else file.write_text(content)
    assert "fsdp_config.json" in refusal(a_run(saved))


@pytest.mark.parametrize("tracker", ["6", "", "four"])
def test_a_tracker_that_names_no_checkpoint(saved: Path, tracker: str) -> None:
    """verl would start from the beginning and overwrite what is there."""
    (saved / "latest_checkpointed_iteration.txt").write_text(tracker)
    said = refusal(a_run(saved))
    assert said.startswith("trainer.default_local_dir: ") and repr(tracker) in said


def test_wrong_ways_to_ask(saved: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'auto'"):
        checkpoint_to_resume(a_run(saved, resume_mode="automatic"))
    for path in (None, str(saved), "global_step_9"):
        with pytest.raises(ConfigError, match="trainer.resume_from_path: "):
            checkpoint_to_resume(a_run(saved, resume_mode="resume_path", resume_from_path=path))
