"""What would stop a run only after Ray has started."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from refine_verl.config import ConfigError
from refine_verl.preflight.start import LOGGER_MODULES, check_loggers, check_own_ray, check_ray_options


def a_config(**options: object) -> DictConfig:
    trainer = {"n_gpus_per_node": 2, "nnodes": 1, "device": "cpu"}
    return DictConfig(OmegaConf.create({"trainer": trainer, "ray_kwargs": {"ray_init": options}}))


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key of a logger and no setting of Ray from the machine at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "/tmp")
    names = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_CONFIG_DIR", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC")
    for name in (*names, "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_a_logger_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_MODULES, "mlflow", "no_such_package")
    with pytest.raises(ConfigError, match="mlflow needs the package no_such_package") as caught:
        check_loggers(["console", "mlflow"])
    assert caught.value.key == "trainer.logger"
    check_loggers("console")


def test_every_logger_of_verl_is_known() -> None:
    from verl.utils.tracking import Tracking

    assert set(Tracking.supported_backend) == {*LOGGER_MODULES, "console", "file"}


def test_wandb_has_a_key_or_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(LOGGER_MODULES, "wandb", "json")  # as if it were installed
    with pytest.raises(ConfigError, match="wandb has no key. Run `wandb login`"):
        check_loggers(["wandb"])
    with monkeypatch.context() as with_mode:
        with_mode.setenv("WANDB_MODE", "offline")
        check_loggers(["wandb"])
    with monkeypatch.context() as with_key:
        with_key.setenv("WANDB_API_KEY", "x")
        check_loggers(["wandb"])
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    check_loggers(["wandb"])


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"nonsense": 1}, "nonsense", "no such argument"),
        ({"num_cpu": 1}, "num_cpu", "Did you mean 'num_cpus'"),
        ({"num_cpus": -1}, "num_cpus", "must be at least 2, got -1"),
        ({"num_cpus": "many"}, "num_cpus", "must be an integer, got 'many'"),
        ({"object_store_memory": 5}, "object_store_memory", "must be at least"),
        ({"runtime_env": {"env_vars": {"MY_FLAG": 1}}}, "runtime_env.env_vars.MY_FLAG", "takes a text, got 1. Write"),
        ({"runtime_env": {"env_vars": ["A"]}}, "runtime_env.env_vars", "a section"),
        ({"runtime_env": {"pip": 5}}, "runtime_env", "Ray refuses it"),
    ],
)
def test_options_of_ray(options: dict[str, object], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ray_options(a_config(**options), local=True)
    assert message in str(caught.value)
    assert caught.value.key == f"ray_kwargs.ray_init.{key}"


def test_options_that_are_right() -> None:
    environment = {"env_vars": {"MY_FLAG": "1"}, "py_executable": None}
    check_ray_options(a_config(num_cpus=2, log_to_driver=True, _temp_dir="/tmp", runtime_env=environment), local=True)
    with pytest.raises(ConfigError, match="this one joins a cluster"):
        check_ray_options(a_config(num_cpus=2), local=False)


def test_a_place_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_own_ray(a_config())
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 90)))
    with pytest.raises(ConfigError, match="is too long: Ray's sockets") as caught:
        check_own_ray(a_config())
    assert caught.value.key == "TMPDIR"
    monkeypatch.setenv("TMPDIR", "/dev/null/x")
    with pytest.raises(ConfigError, match="/dev/null is no directory, and Ray keeps its files there"):
        check_own_ray(a_config())
    check_own_ray(a_config(_temp_dir="/tmp"))


def test_a_place_for_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=disabled") as caught:
        check_own_ray(a_config())
    assert caught.value.key == "HOME"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    check_own_ray(a_config())
