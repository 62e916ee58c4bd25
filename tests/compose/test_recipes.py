"""What is shipped: every recipe with every preset, and the paper's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import refine_verl
from refine_verl.compose.composition import compose_config
from refine_verl.compose.recipes import find_configs
from refine_verl.compose.schema import leaves
from refine_verl.compose.validate import check_against_verl, validate
from refine_verl.data import DataSettings

RECIPES = [file.name for file in find_configs({}) if file.group == "recipe"]
PRESETS = [file.name for file in find_configs({}) if file.group == "model"]
GIVEN = ["data.train_files=FILE"]


def compose_with(recipe: str, preset: str, *more: str) -> DictConfig:
    path = ["model.path=DIR"] if preset == "auto" else []
    given = ["data.val_files=FILE"] if recipe.startswith("ttt") else GIVEN
    return compose_config([f"recipe={recipe}", f"model={preset}", *path, *given, *more])


def test_the_names_users_type() -> None:
    phases = {"posttrain", "posttrain_nested_sft", "posttrain_sft", "ttt", "ttt_sft"}
    assert set(RECIPES) == {"midtrain", "midtrain_many_rollouts", "sft", "pretrain", "quickstart"} | phases
    hybrids = {
        "gated_deltanet_hybrid",
        "tiny_deltanet_hybrid",
        "olmo_hybrid_7b",
        "qwen3_5_9b",
        "qwen3_next_80b_a3b",
        "tiny_olmo_hybrid",
        "tiny_qwen3_5",
        "tiny_qwen3_next",
    }
    others = {"auto", "deltanet_1b3", "gated_deltanet", "lact_760m", "tiny_deltanet", "tiny_lact"}
    assert set(PRESETS) == others | hybrids


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_goes_with_every_preset(recipe: str, preset: str, empty_directory: Path) -> None:
    valid = validate(compose_with(recipe, preset))
    assert valid.config.trainer.experiment_name == recipe
    assert Path(valid.config.trainer.default_local_dir) == empty_directory / "outputs/refine_verl" / recipe
    assert not OmegaConf.missing_keys(valid.config) - {"reward.reward_model.rollout.name"}
    assert not any(isinstance(value, str) and "${" in value for _, value in leaves(valid.config))
    assert list(empty_directory.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_verl_accepts_every_recipe(recipe: str) -> None:
    check_against_verl(validate(compose_with(recipe, "tiny_deltanet")).config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # Tab. 2
        ("refine.nsp.chunks", 8),
        ("refine.nsp.rollout_length", 5),
        ("refine.nsp.rollouts_per_position", 1),
        ("refine.nsp.reward", "cosine"),
        ("refine.loss.rl_coef", 0.2),
        ("refine.loss.sft_coef", 1.0),
        ("data.train_batch_size", 128),
        ("actor_rollout_ref.actor.optim.lr", 1e-6),
        # Tab. D.1
        ("data.max_length", 16384),
        ("refine.ppo_mini_batch_size", 32),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", 32),
        ("refine.nsp.temperature", 1.0),
        ("actor_rollout_ref.actor.clip_ratio", 0.2),
        ("actor_rollout_ref.actor.clip_ratio_low", 0.2),
        ("actor_rollout_ref.actor.clip_ratio_high", 0.2),
        ("actor_rollout_ref.actor.grad_clip", 1.0),
        ("actor_rollout_ref.actor.optim.clip_grad", 1.0),
        ("actor_rollout_ref.actor.optim.optimizer", "AdamW"),
        ("actor_rollout_ref.actor.optim.betas", [0.9, 0.999]),
        ("actor_rollout_ref.actor.optim.weight_decay", 0.01),
        ("actor_rollout_ref.actor.entropy_coeff", 0),
        ("actor_rollout_ref.actor.use_kl_loss", False),
        ("algorithm.use_kl_in_reward", False),
        ("algorithm.adv_estimator", "grpo"),
        ("algorithm.norm_adv_by_std_in_grpo", True),
        # Section 4: 100 steps
        ("trainer.total_training_steps", 100),
        # Eq. 6, the authors' code for the anchor
        ("refine.nsp.selection", "entropy"),
        ("refine.nsp.entropy_temperature", 1.0),
        ("refine.nsp.anchor", "prediction"),
        ("refine.nsp.group", "sequence"),
        ("refine.nsp.grad_scope", "full"),
        ("refine.warmup_steps", 0),
    ],
)
def test_midtrain_has_the_papers_value(key: str, value: Any, midtrain: DictConfig) -> None:
    assert OmegaConf.select(midtrain, key, throw_on_missing=True) == value


@pytest.fixture(scope="module")
def midtrain() -> DictConfig:
    return validate(compose_with("midtrain", "deltanet_1b3")).config


def test_sft_differs_from_midtrain_in_the_loss_alone(midtrain: DictConfig) -> None:
    sft = validate(compose_with("sft", "deltanet_1b3")).config
    given, base = dict(leaves(sft)), dict(leaves(midtrain))
    different = {key for key in base if base[key] != given.get(key)}
    names = {"trainer.experiment_name", "trainer.default_local_dir"}
    echoes = {"actor_rollout_ref.rollout.trace.experiment_name"}
    assert different - names - echoes == {"refine.loss.rl_coef"}
    assert given["refine.loss.rl_coef"] == 0.0
    assert given.keys() == base.keys()


def test_many_rollouts_differ_from_midtrain_in_the_estimator_alone(midtrain: DictConfig) -> None:
    many = validate(compose_with("midtrain_many_rollouts", "deltanet_1b3")).config
    given, base = dict(leaves(many)), dict(leaves(midtrain))
    own = ("refine.", "algorithm.", "data.", "model.")  # verl's sections follow
    different = {key: given.get(key) for key in base if key.startswith(own) and base[key] != given.get(key)}
    assert different == {
        "refine.nsp.chunks": 32,
        "refine.nsp.rollouts_per_position": 8,
        "refine.nsp.group": "position",
        "refine.nsp.credit": "token",
        "refine.nsp.reward": "binary",
        "refine.loss.rl_coef": 5.0,
        "algorithm.norm_adv_by_std_in_grpo": False,
        "data.min_length": 37,
    }


def test_cpu_safe_settings_and_verl_follows_the_short_keys(midtrain: DictConfig) -> None:
    actor, model = midtrain.actor_rollout_ref.actor, midtrain.actor_rollout_ref.model
    assert actor.strategy == actor.fsdp_config.strategy == "fsdp2"
    assert actor.fsdp_config.model_dtype == "fp32"
    assert set(actor.fsdp_config.mixed_precision.values()) == {"fp32"}
    assert not model.use_remove_padding and not model.enable_gradient_checkpointing
    assert model.override_config.attn_implementation == "eager"
    assert actor.fsdp_config.seed == midtrain.data.seed
    assert midtrain.trainer.use_v1 and midtrain.trainer.v1.trainer_mode == "sync"


def test_device_and_workers_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from refine_verl.compose import composition as compose

    monkeypatch.setattr(compose, "_gpu_count", lambda: 0)
    config = compose_with("midtrain", "tiny_deltanet")
    assert (config.trainer.device, config.trainer.n_gpus_per_node) == ("cpu", 1)
    assert config.actor_rollout_ref.actor.fsdp_config.dtype == "float32"
    monkeypatch.setattr(compose, "_gpu_count", lambda: 8)
    assert (config.trainer.device, config.trainer.n_gpus_per_node) == ("cuda", 8)
    assert config.actor_rollout_ref.actor.fsdp_config.dtype == "bfloat16"


def test_every_setting_of_the_document_pipeline_can_be_set() -> None:
    import dataclasses

    data = compose_with("midtrain", "tiny_deltanet").data
    assert {field.name for field in dataclasses.fields(DataSettings)} <= set(data)
    assert data.custom_cls.path == "pkg://refine_verl.data.verl_dataset"


def test_every_file_begins_with_what_it_is_for() -> None:
    for file in find_configs({}):
        assert file.summary, f"{file.path} does not begin with what it is for"


def test_the_shipped_recipes_are_those_at_the_top_of_the_repository() -> None:
    package = Path(refine_verl.__file__).parent
    top = package.parent / "recipes"
    assert (package / "recipes").is_dir()
    if top.is_dir():
        assert (package / "recipes").resolve() == top.resolve()


def test_presets_are_models_of_the_size_they_claim() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from refine_verl.models.loading import inspect_model

    sizes = {}
    for file in find_configs({}):
        if file.group == "model" and file.name != "auto":
            values = OmegaConf.to_container(file.content.config)
            assert isinstance(values, dict)
            info = inspect_model(None, {str(key): value for key, value in values.items()})
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(info.config)
            sizes[file.name] = sum(parameter.numel() for parameter in model.parameters())
    assert sizes["deltanet_1b3"] == 1_365_677_056
    assert 1.2e9 < sizes["gated_deltanet"] < 1.5e9
    assert 1e6 < sizes["tiny_deltanet"] < 3e6
    assert sizes["lact_760m"] == 797_625_312
    assert 1.3e9 < sizes["gated_deltanet_hybrid"] < 1.6e9
    assert sizes["olmo_hybrid_7b"] == 7_430_870_688
    assert sizes["qwen3_5_9b"] == 8_953_803_264
    assert 79e9 < sizes["qwen3_next_80b_a3b"] < 81e9
    assert all(1e6 < size < 3e6 for name, size in sizes.items() if name.startswith("tiny_"))
