"""Names of runs and of the jobs of a sweep, and sweeps that are refused before their first job."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from refine_verl import main as cli
from refine_verl.command.jobs import exclude_shared, sweep_jobs
from refine_verl.compose.composition import compose_config
from refine_verl.compose.naming import LONGEST_NAME, given_overrides, run_name
from refine_verl.compose.validate import ValidConfig
from refine_verl.main import main

RecipeFile = Callable[..., Path]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """Configurations of the jobs that ran, of `main`; nothing is trained."""
    ran: list[DictConfig] = []

    def run(valid: ValidConfig, *_: object) -> int:
        ran.append(valid.config)
        return 0

    monkeypatch.setattr(cli, "run", run)
    return ran


def names(*overrides: str) -> list[str]:
    """Of the jobs of a sweep."""
    apart = exclude_shared(overrides)
    found = sweep_jobs(overrides)
    assert found is not None
    return [compose_config([*job, apart, "hydra.mode=MULTIRUN"]).trainer.experiment_name for job in found]


def test_a_name_holds_what_varies_and_nothing_else() -> None:
    assert names("recipe=quickstart", "refine.nsp.chunks=2,4", "data.seed=3") == [
        "quickstart_refine.nsp.chunks=2",
        "quickstart_refine.nsp.chunks=4",
    ]
    assert names("recipe=midtrain,sft", "data.seed=3") == ["midtrain", "sft"]
    assert names("recipe=quickstart", "trainer.save_freq=-1,5", "model=tiny_deltanet,auto")[1:3] == [
        "quickstart_trainer.save_freq=-1_model=auto",
        "quickstart_trainer.save_freq=5_model=tiny_deltanet",
    ]


def test_lists_paths_and_new_keys_stay_apart() -> None:
    found = names("recipe=quickstart", "data.train_files=[a/b],[a,b],a/b,a-b", "+ray_kwargs.ray_init._temp_dir=/x,/y")
    assert len(set(found)) == 8
    for name in found:
        assert "/" not in name and "data.train_files=" in name and "ray_kwargs.ray_init._temp_dir=" in name


def test_long_values_and_many_keys_keep_every_key_and_stay_apart() -> None:
    values = [f"/data/{'x' * 300}/{i}.txt" for i in range(3)]
    found = names("recipe=quickstart", f"data.train_files={','.join(values)}", "refine.nsp.temperature=0.5,1.0")
    assert len(set(found)) == 6
    assert all("data.train_files=" in name and "refine.nsp.temperature=" in name for name in found)
    assert all(len(name) <= LONGEST_NAME + 9 for name in found)
    many = [(f"actor_rollout_ref.actor.optim.{letter * 6}", "0.5") for letter in "abcdefghij"]
    name = run_name(["midtrain"], many)
    assert len(name) <= LONGEST_NAME + 9 and all(f"{key.rpartition('.')[2]}=" in name for key, _ in many)


def test_different_jobs_never_have_one_name() -> None:
    values = ["a", "a/b", "a-b", "[a,b]", "a b", "a_b", "a=b", "1_c=2", "", "A" * 500, "A" * 501]
    pairs = itertools.product(values, repeat=2)
    found = [run_name(["r"], [("k", first), ("c", second)]) for first, second in pairs]
    assert len(set(found)) == len(values) ** 2


def test_each_job_gets_a_directory_of_its_own(jobs: list[DictConfig], empty_directory: Path) -> None:
    assert main(["-m", "recipe=quickstart", "trainer.total_training_steps=60,70", "data.seed=3"]) == 0
    directories = [job.trainer.default_local_dir for job in jobs]
    assert directories == [
        str(empty_directory / f"outputs/refine_verl/quickstart_trainer.total_training_steps={steps}")
        for steps in (60, 70)
    ]
    assert list(empty_directory.iterdir()) == []


@pytest.mark.parametrize("fixed", ["trainer.experiment_name=x", "trainer.default_local_dir=runs/x"])
def test_jobs_that_would_share_a_directory_are_refused(
    fixed: str, jobs: list[DictConfig], capfd: pytest.CaptureFixture[str], empty_directory: Path
) -> None:
    assert main(["-m", "recipe=quickstart", "refine.nsp.chunks=2,4", fixed]) == 2
    said = capfd.readouterr().err
    assert "trainer.default_local_dir: the runs of this sweep would share" in said
    assert "(one with refine.nsp.chunks=4)" in said
    assert jobs == [] and list(empty_directory.iterdir()) == []
    own = "trainer.default_local_dir=runs/${refine.nsp.chunks}"
    assert main(["-m", "recipe=quickstart", "refine.nsp.chunks=2,4", own]) == 0
    assert [job.trainer.default_local_dir for job in jobs] == [
        str(empty_directory / f"runs/{chunks}") for chunks in (2, 4)
    ]


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ("refine.nsp.chunks=4,0", "refine.nsp.chunks: must be at least 1, got 0"),
        ("model.path=null,./nowhere", "model.path=./nowhere: no such directory"),
        ("actor_rollout_ref.actor.optim.optimizer=AdamW,Adamm", "no optimiser 'Adamm'"),
        ("data.train_files=python_stdlib:train,gone.txt", "gone.txt"),
        ("refine.nsp.chunks=interval(1,4)", "BasicSweeper does not support sweep type"),
    ],
)
def test_a_job_that_cannot_run_stops_the_sweep_before_the_first(
    swept: str, message: str, jobs: list[DictConfig], capfd: pytest.CaptureFixture[str], empty_directory: Path
) -> None:
    assert main(["-m", "recipe=quickstart", swept]) == 2
    said = capfd.readouterr().err
    assert message in said and said.count("error: ") == 1 and "Traceback" not in said
    assert jobs == [] and list(empty_directory.iterdir()) == []


def test_a_sweep_over_recipes_of_config_dir(tmp_path: Path, jobs: list[DictConfig]) -> None:
    path = tmp_path / "configs" / "recipe" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ndefaults: [quickstart, _self_]\nrefine: {nsp: {chunks: 3}}\n")
    assert main(["-m", "--config-dir", str(tmp_path / "configs"), "recipe=mine,quickstart"]) == 0
    assert [job.refine.nsp.chunks for job in jobs] == [3, compose_config(["recipe=quickstart"]).refine.nsp.chunks]
    assert [job.trainer.experiment_name for job in jobs] == ["mine", "quickstart"]


def test_what_was_given_is_known() -> None:
    key = "ray_kwargs.ray_init.runtime_env"
    given = [f"++{key}={{env_vars: {{A: '1'}}}}", "~refine.nsp.chunks", "trainer.project_name='a b'"]
    compose_config(
        ["recipe=[midtrain,pretrain]", "model=tiny_deltanet", *given, "trainer.nnodes=${trainer.max_restarts}"]
    )
    assert given_overrides() == {
        "recipe": ["midtrain", "pretrain"],
        "model": "tiny_deltanet",
        key: {"env_vars": {"A": "1"}},
        "~refine.nsp.chunks": None,
        "trainer.project_name": "a b",
        "trainer.nnodes": "${trainer.max_restarts}",
    }
