"""The command line: exit codes, one message, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from refine_verl.main import main

RecipeFile = Callable[..., Path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "recipe: choose one with recipe=NAME. Available: midtrain, "),
        (
            ["recipe=midtran"],
            ". Did you mean 'midtrain'?",
        ),
        (["recipe=[midtrain,stf]"], ". Did you mean 'sft'?"),
        (["recipe=midtrain,sft"], "recipe=[midtrain,sft] for a list, or add -m"),
        (["recipe=null"], "take names: recipe=midtrain"),
        (["recipe=quickstart", "model=null"], "take names: recipe=midtrain"),
        (["recipe=quickstart", "data=[1]"], "take names: recipe=midtrain"),
        (["recipe=[1]"], "take names: recipe=midtrain"),
        (["recipe=quickstart", "trainer.experiment_name=null"], "trainer.experiment_name: must be a name, got None"),
        (["recipe=quickstart", "trainer.default_local_dir=null"], "trainer.default_local_dir: must be a name"),
        (["recipe=quickstart", "trainer.default_local_dir=/dev/null/x"], "/dev/null is no directory"),
        (["recipe=quickstart", "model=tiny_deltnet"], "model: unknown model preset 'tiny_deltnet'"),
        (["recipe=quickstart", "model=hf_model"], "model: this is a part of verl"),
        (
            ["recipe=quickstart", "refine.nsp.chunk=3"],
            "refine.nsp.chunk: unknown key. Did you mean 'refine.nsp.chunks'?",
        ),
        (["recipe=quickstart", "lr=3"], "lr: unknown key. Did you mean 'actor_rollout_ref.actor.optim.lr'?"),
        (["recipe=quickstart", "+refine.nsp.chunk=3"], "refine.nsp.chunk: unknown key."),
        (["recipe=quickstart", "foo=1"], "foo: unknown key. See --help for the keys."),
        (
            ["recipe=quickstart", "ray_kwargs.ray_init.zzz=1"],
            "ray_kwargs.ray_init.zzz: unknown key. Add a key of your own with a plus: +ray_kwargs.ray_init.zzz=...",
        ),
        (
            ["recipe=posttrain", "data.apply_chat_template_kwargs={a:1}"],
            "takes keys of your own one by one, each with a plus: +data.apply_chat_template_kwargs.NAME=VALUE.",
        ),
        (["recipe=quickstart", "refine.nsp={mine:1}"], "refine.nsp: unknown key in its value. Allowed: chunks, "),
        (["recipe=quickstart", "refine.nsp.chunks"], "not of the form key=value"),
        (["recipe=quickstart", "data.train_files=a=b"], "Quote special characters"),
        (["recipe=quickstart", "refine.nsp.chunks=0"], "refine.nsp.chunks: must be at least 1, got 0."),
        (
            ["-m", "recipe=quickstart", "refine.nsp.chunks=0,4"],
            "refine.nsp.chunks: must be at least 1, got 0.",
        ),
        (["recipe=midtrain", "data.train_files=x"], "model.path: no model given"),
        (["recipe=midtrain", "data.train_files=x", "model.path=./nowhere"], "nowhere: no such directory"),
        (
            ["recipe=midtrain_many_rollouts", "data.train_files=x", "model.path=x", "data.max_length=36"],
            "data.max_length: 36 is too short: refine.nsp.chunks=32 positions with refine.nsp.rollout_length=5 tokens",
        ),
        (
            ["recipe=midtrain_many_rollouts", "refine.nsp.rollouts_together=0"],
            "refine.nsp.rollouts_together: must be at least 1, got 0",
        ),
        (
            ["recipe=midtrain_grouped"],
            "recipe: 'midtrain_grouped' is no longer there: recipe=midtrain_many_rollouts has",
        ),
        (["recipe=quickstart", "refine.nsp.reward=nowhere.reward"], "refine.nsp.reward: "),
        (["recipe=quickstart", "refine.nsp.reward=cosin"], "Did you mean 'cosine'?"),
        (["recipe=quickstart", "refine.nsp.rollout_length={min:5,max:2}"], "rollout_length.min: 5 is more than "),
        (
            ["recipe=quickstart", "refine.nsp.rollout_length={maxi:5}"],
            "rollout_length.maxi: unknown key. Allowed: min,",
        ),
        (
            ["recipe=quickstart", "refine.nsp.rollout_length.max=5"],
            'Write the section as a whole: "refine.nsp.rollout_',
        ),
        (["recipe=quickstart", "refine.nsp.rollout_length=[5]"], "refine.nsp.rollout_length: "),
        (
            [
                "recipe=quickstart",
                "refine.nsp.rollout_length={min:1,max:4}",
                "refine.on_policy=true",
                "actor_rollout_ref.actor.loss_agg_mode=token-mean",
            ],
            "refine.on_policy: true with rollouts of unequal lengths",
        ),
        (["recipe=quickstart", "refine.nsp.selection=max_entopy"], "Did you mean 'max_entropy'?"),
        (
            ["recipe=quickstart", "refine.nsp.selection=torch.zeros_like"],
            "refine.nsp.selection: selection strategy 'torch.zeros_like' (torch._VariableFunctionsClass.zeros_like) "
            "raised TypeError: ",
        ),
        (["recipe=quickstart", "refine.nsp.selection=no name"], "refine.nsp.selection: 'no name' is no name"),
        (["recipe=quickstart", "data.train_files=nowhere.jsonl", "model.tokenizer=bytes"], "nowhere.jsonl"),
        (
            ["recipe=quickstart", "model.tokenizer=bytes", "model.config.vocab_size=100"],
            "model.tokenizer: bytes has 257 tokens, but the model predicts only 100",
        ),
    ],
)
def test_bad_input_exits_with_2_one_line_and_writes_nothing(
    arguments: list[str],
    message: str,
    empty_directory: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(arguments) == 2
    said = capfd.readouterr().err
    assert message in said
    assert said.count("error: ") == 1 and "Traceback" not in said and "HYDRA_FULL_ERROR" not in said
    assert list(empty_directory.iterdir()) == []
    assert not (tmp_path / "cache").exists()


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str], directory: Path) -> str:
    assert main(arguments) == 2 and list(directory.iterdir()) == []
    return capfd.readouterr().err


def test_layers_that_are_not_known(
    empty_directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from refine_verl.models.adapters import FlaAdapter

    class OneMethod:
        run = FlaAdapter.run

    monkeypatch.setattr("refine_verl.models.adapters.adapter_for", lambda _: OneMethod())
    said = refused(["recipe=quickstart", "model.activation_checkpointing=layer"], capfd, empty_directory)
    assert "error: model.activation_checkpointing: layer needs an adapter" in said and "Set segment" in said


def test_a_triton_that_does_not_train_the_model(
    empty_directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from packaging.version import Version

    from refine_verl.kernels import versions
    from refine_verl.preflight import run

    monkeypatch.setattr(run, "_check_device", lambda _: None)  # an H100 with the triton of torch 2.11
    monkeypatch.setattr(versions, "oldest_capability", lambda: (9, 0))
    monkeypatch.setattr(versions, "installed", lambda: versions.Installed(Version("3.6.0"), False))
    gated = ["recipe=quickstart", "model=gated_deltanet", "trainer.device=cuda"]
    said = refused(gated, capfd, empty_directory)
    assert "error: model: the gradients of a gated_deltanet" in said and "triton" in said
    assert "gradients" not in refused(["recipe=quickstart", "trainer.device=cuda", "lr=3"], capfd, empty_directory)


def test_a_parent_that_does_not_exist_is_named(recipe_file: RecipeFile, capfd: pytest.CaptureFixture[str]) -> None:
    recipe_file("mine", "defaults: [midtrian, _self_]\n")
    assert main(["recipe=mine"]) == 2
    assert "unknown recipe 'midtrian' (in the defaults of 'mine')" in capfd.readouterr().err


def test_a_wrong_key_in_config_dir_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configs" / "recipe" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ndefaults: [quickstart, _self_]\nrefine: {nsp: {chunk: 3}}\n")
    assert main(["--config-dir", str(tmp_path / "configs"), "recipe=mine"]) == 2
    assert f"refine.nsp.chunk: unknown key (in {path})" in capfd.readouterr().err


def test_help_shows_recipes_presets_and_keys(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capfd.readouterr().out
    for name in ("quickstart", "tiny_deltanet", "refine.nsp.rollout_length=5", "REFINE_RECIPES_PATH"):
        assert name in said


def test_a_good_configuration_reaches_the_trainer(
    empty_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from omegaconf import DictConfig

    from refine_verl.trainer import launch

    received: list[DictConfig] = []
    noted: dict[str, object] = {}

    def train(config: DictConfig, signals: object, overrides: dict[str, object]) -> Path:
        received.append(config)
        noted.update(overrides)
        return Path(config.trainer.default_local_dir)

    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (empty_directory / "text.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    files = ["data.train_files=text.txt", "data.val_files=text.txt", "data.train_batch_size=2"]
    more = [
        "refine.ppo_mini_batch_size=2",
        "data.max_length=64",
        "data.min_length=null",
        "model.tokenizer=bytes",
        "trainer.logger=[]",
    ]
    micro = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]
    assert main(["recipe=quickstart", *files, *more, *micro]) == 0
    assert list(noted) == ["recipe", *(item.partition("=")[0] for item in [*files, *more, *micro])]
    assert noted["recipe"] == "quickstart" and noted["data.min_length"] is None and noted["trainer.logger"] == []
    assert noted["refine.ppo_mini_batch_size"] == 2
    config = received[0]
    assert config.data.min_length == config.refine.nsp.chunks + config.refine.nsp.rollout_length
    run_dir = empty_directory / "outputs" / "refine_verl" / "quickstart"
    model = config.actor_rollout_ref.model
    assert model.path == model.tokenizer_path == str(run_dir / "initial_model")
    assert (run_dir / "initial_model" / "config.json").is_file()
    assert (run_dir / "initial_model" / "tokenizer.json").is_file()
    assert Path(config.data.train_files[0]).is_dir() and Path(config.data.val_files[0]).is_dir()


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "refine_verl.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_as_a_process_bad_input_exits_with_2(empty_directory: Path) -> None:
    done = run_python("recipe=quickstart", "refine.nsp.chunk=3", cwd=empty_directory)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("Did you mean 'refine.nsp.chunks'?")
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert list(empty_directory.iterdir()) == []


def test_as_a_process_the_configuration_can_be_shown_without_running(empty_directory: Path) -> None:
    done = run_python("recipe=midtrain", "--cfg", "job", "--resolve", cwd=empty_directory)
    assert done.returncode == 0, done.stderr
    assert "chunks: 8" in done.stdout and "experiment_name: midtrain" in done.stdout and "${" not in done.stdout
    assert list(empty_directory.iterdir()) == []
