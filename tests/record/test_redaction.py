"""Secrets stay out of what a run writes, logs and shows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from refine_verl.compose.composition import base_schema, compose_config
from refine_verl.compose.naming import given_overrides
from refine_verl.compose.schema import leaves
from refine_verl.record.redaction import HIDDEN, is_secret, redacted

TOKEN = "wandb-0123456789"


@pytest.mark.parametrize(
    "key",
    [
        "ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "RAY_AUTH_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "CLEARML_API_SECRET_KEY",
        "logger.wandb_api_key",
        "trainer.client_secret",
        "db-password",
        "swanlab_apikey",
        "token",
    ],
)
def test_secrets(key: str) -> None:
    assert is_secret(key) and is_secret(key.lower()) and is_secret(key.upper())


@pytest.mark.parametrize(
    "key",
    [
        "ray_kwargs.ray_init.runtime_env.env_vars.OPENAI_KEY",
        "OPENAI_KEY",
        "GEMINI_2_KEY",
        "env_vars.openai_key",
        "env_vars.MYKEY",
        "env_vars.KEY",
        "env_vars.OPENAI_KEYS",
        "env_vars.AZURE_KEY_2",
        "env_vars.SERVICE_KEY_ID",
    ],
)
def test_keys_of_services(key: str) -> None:
    assert is_secret(key)
    section, _, name = key.rpartition(".")
    tree: dict[str, Any] = {name: TOKEN}
    for part in reversed(section.split(".") if section else []):
        tree = {part: tree}
    assert TOKEN not in str(redacted(tree))


@pytest.mark.parametrize(
    "key",
    [
        "eos_token",
        "model.config.pad_token_id",
        "tokens_per_step",
        "keys",
        "data.prompt_key",
        "data.text_key",
        "data.reward_fn_key",
        "distillation.teacher_models.teacher_model.key",
        "reward.custom_reward_function.reward_kwargs.label_key",
        "env_vars.TOKENIZERS_PARALLELISM",
        "env_vars.KEYBOARD",
        "env_vars.KEY_FILE",
    ],
)
def test_no_secrets(key: str) -> None:
    assert not is_secret(key)


def test_no_setting_is_taken_for_a_secret() -> None:
    assert [key for key, _ in leaves(base_schema()) if is_secret(key)] == []


def test_everything_else_stays() -> None:
    tree = {"a": {"api_key": TOKEN, "n": 1, "empty_token": "", "none_password": None}, "b": [1, {"secret": "x"}, "y"]}
    hidden = {"api_key": HIDDEN, "n": 1, "empty_token": "", "none_password": None}
    assert redacted(tree) == {"a": hidden, "b": [1, {"secret": HIDDEN}, "y"]}
    assert tree["a"]["api_key"] == TOKEN  # the configuration itself is not touched
    assert redacted({"https_proxy": "http://me:word@host:80/x"}) == {"https_proxy": f"http://me:{HIDDEN}@host:80/x"}
    assert redacted("s3://bucket:8080/path@2") == "s3://bucket:8080/path@2"


class Reached(Exception):
    """The trainer was asked to start."""


def start(run_dir: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """What `train` does before Ray."""
    from refine_verl.trainer import launch

    def no_ray(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(launch, "ray_session", no_ray)
    overrides = ["recipe=quickstart", f"trainer.default_local_dir={run_dir}", *more]
    config = compose_config(overrides)
    with pytest.raises(Reached):
        launch.train(config, overrides=given_overrides())


def test_what_a_run_writes_and_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "ray_kwargs.ray_init.runtime_env.env_vars"
    caplog.set_level(logging.INFO, logger="refine_verl")
    start(tmp_path / "run", monkeypatch, f"+{key}.WANDB_API_KEY={TOKEN}", f"+{key}.NCCL_SOCKET_IFNAME=eth0")
    written = OmegaConf.load(tmp_path / "run" / "config.yaml")
    section = OmegaConf.select(written, key)
    assert section.WANDB_API_KEY == HIDDEN and section.NCCL_SOCKET_IFNAME == "eth0"
    given = yaml.safe_load((tmp_path / "run" / "overrides.yaml").read_text())
    assert given == {
        "recipe": "quickstart",
        "trainer.default_local_dir": str(tmp_path / "run"),
        f"{key}.WANDB_API_KEY": HIDDEN,
        f"{key}.NCCL_SOCKET_IFNAME": "eth0",
    }
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or TOKEN not in file.read_text(), file
    # another one the next time: what changed is said, the secret is not
    start(tmp_path / "run", monkeypatch, f"+{key}.WANDB_API_KEY={TOKEN}2", f"+{key}.NCCL_SOCKET_IFNAME=eth1")
    said = caplog.text
    assert "eth0 -> eth1" in said and TOKEN not in said


def test_what_goes_to_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from refine_verl.trainer import refine_trainer

    sent: dict[str, Any] = {}

    class Tracking:
        def __init__(self, **arguments: Any) -> None:
            sent.update(arguments)
            raise Reached

    monkeypatch.setattr(refine_trainer, "Tracking", Tracking)
    key = "ray_kwargs.ray_init.runtime_env.env_vars"
    config = compose_config(
        ["recipe=quickstart", f"trainer.default_local_dir={tmp_path}", f"+{key}.WANDB_API_KEY={TOKEN}"]
    )
    trainer = object.__new__(refine_trainer.RefineTrainer)
    trainer.config, trainer.run_dir, trainer.global_steps = config, tmp_path, 0
    with pytest.raises(Reached), trainer._recorder(None):
        pass
    assert TOKEN not in str(sent["config"]) and HIDDEN in str(sent["config"])
