"""verl's keys that only a worker would stumble over."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.composition import compose_config
from refine_verl.compose.validate import check_against_verl, validate
from refine_verl.config import ConfigError

ACTOR = "actor_rollout_ref.actor"


@pytest.fixture(scope="module")
def quickstart() -> DictConfig:
    return compose_config(["recipe=quickstart"])


def changed(config: DictConfig, key: str, value: object) -> DictConfig:
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    assert isinstance(copy, DictConfig)
    OmegaConf.update(copy, f"{ACTOR}.{key}", value, merge=False, force_add=True)
    return copy


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lr_scheduler_type", "linear", "unknown schedule 'linear'. Allowed: constant, cosine"),
        ("optim.lr_scheduler_type", "cosin", "Did you mean 'cosine'"),
        ("optim.lr_warmup_steps_ratio", 5, "at most 1, got 5"),
        ("optim.min_lr_ratio", -0.1, "at least 0, got -0.1"),
        ("optim.lr_warmup_steps", None, "must be an integer"),
        ("optim.clip_grad", 0, "greater than 0, got 0"),
        ("optim.clip_grad", None, "must be a number, got None"),
        ("optim.betas", [0.9], "takes two numbers"),
        ("fsdp_config.fsdp_size", 0, "must be -1"),
        ("clip_ratio_c", 1.0, "greater than 1"),
        ("clip_ratio_low", -0.2, "at least 0"),
        ("checkpoint.save_contents", ["model", "optimiser"], "unknown content 'optimiser'. Allowed: model, optimizer"),
        ("checkpoint.save_contents", [], "is empty. Name some of model"),
        ("checkpoint.save_contents", "model", r"takes a list: write .*save_contents=\[model\]"),
        ("checkpoint.load_contents", ["weights"], "unknown content 'weights'"),
        ("checkpoint.async_save", True, "saves while training waits"),
        ("fsdp_config.model_dtype", "bf16", "'bf16' cannot be used: parameters, .* float32. The only value is fp32"),
        ("fsdp_config.model_dtype", "flaot32", "The only value is fp32"),
        ("fsdp_config.dtype", "float16", "'float16' cannot be used: on c.* matrix products run in"),
        ("fsdp_config.mixed_precision", None, "null means bfloat16"),
        ("fsdp_config.mixed_precision.param_dtype", "bf16", "The only value is fp32"),
        ("fsdp_config.mixed_precision.reduce_dtype", "fp31", "Did you mean 'fp32'"),
    ],
)
def test_unusable_values_are_refused(quickstart: DictConfig, key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(changed(quickstart, key, value))
    assert caught.value.key == f"{ACTOR}.{key}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr_scheduler_type", "cosine"),
        ("optim.min_lr_ratio", None),
        ("checkpoint.save_contents", ["model", "optimizer", "extra", "hf_model"]),
        ("fsdp_config.model_dtype", "float32"),
        ("fsdp_config.mixed_precision.reduce_dtype", "bf16"),
    ],
)
def test_usable_values_pass(quickstart: DictConfig, key: str, value: object) -> None:
    validate(changed(quickstart, key, value))


@pytest.mark.parametrize(
    ("key", "value", "named", "message"),
    [
        ("optimizer", "AdmaW", "optimizer", "torch.optim has no optimiser 'AdmaW'. Allowed: .* mean 'AdamW'"),
        ("optimizer", "lr_scheduler", "optimizer", "no optimiser 'lr_scheduler'"),
        ("optimizer", "Muon", "optimizer", "'Muon' cannot be used: .*2D parameters"),
        ("optimizer", "LBFGS", "optimizer", "'LBFGS' cannot be used: .*weight_decay"),
        ("optimizer_impl", "torch.optmi", "optimizer_impl", "'torch.optmi' cannot be imported .*Install it"),
        ("override_optimizer_config", {"epsilon": 1}, "optimizer", "with .*override_optimizer_config: .*'epsilon'"),
        ("betas", [0.9, 1.5], "betas", "must be less than 1, got 1.5"),
        ("weight_decay", -1, "weight_decay", "must be at least 0, got -1"),
    ],
)
def test_an_optimiser_that_cannot_be_made(
    quickstart: DictConfig, key: str, value: object, named: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_against_verl(validate(changed(quickstart, f"optim.{key}", value)).config)
    assert caught.value.key == f"{ACTOR}.optim.{named}"


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer", "SGD"), ("optimizer", "Adafactor"), ("override_optimizer_config", {"eps": 1e-6, "fused": True})],
)
def test_optimisers_that_can_be_made(quickstart: DictConfig, key: str, value: object) -> None:
    check_against_verl(validate(changed(quickstart, f"optim.{key}", value)).config)


def test_attention_that_cannot_be_had_is_refused(quickstart: DictConfig) -> None:
    key = "actor_rollout_ref.model.override_config.attn_implementation"
    copy = OmegaConf.create(OmegaConf.to_container(quickstart, resolve=False))
    for value, wrong in (("sdpa", False), ("flash_attention_2", True)):
        OmegaConf.update(copy, key, value)
        assert isinstance(copy, DictConfig)
        if not wrong:
            validate(copy)
            continue
        with pytest.raises(ConfigError, match="'flash_attention_2'. Allowed: eager, sdpa") as caught:
            validate(copy)
        assert caught.value.key == key
