"""Unknown keys anywhere, values that do not fit together, and what verl refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.composition import compose_config
from refine_verl.compose.recipes import find_configs
from refine_verl.compose.validate import check_against_verl, validate
from refine_verl.compose.verl_keys import FIXED, FOLLOWERS, UNSUPPORTED_LOSSES
from refine_verl.config import ConfigError

RecipeFile = Callable[..., Path]


@pytest.fixture(scope="module")
def quickstart() -> DictConfig:
    """With sizes of its own, so that tuning the recipe changes no test."""
    sizes = ["refine.ppo_mini_batch_size=8", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8"]
    sizes += ["refine.nsp.chunks=8", "data.max_length=512"]
    return compose_config(["recipe=quickstart", "data.min_length=null", *sizes])


def changed(config: DictConfig, **values: object) -> DictConfig:
    """A copy with dotted keys set (`__` stands for a dot)."""
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    assert isinstance(copy, DictConfig)
    for key, value in values.items():
        OmegaConf.update(copy, key.replace("__", "."), value, merge=False, force_add=True)
    return copy


def refusal(config: DictConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        validate(config, find_configs())
    return caught.value


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("refine: {nsp: {chunk: 4}}", "refine.nsp.chunk", "refine.nsp.chunks"),
        ("refine: {loss: {rl_coeff: 1}}", "refine.loss.rl_coeff", "refine.loss.rl_coef"),
        ("nsp: {chunks: 4}", "nsp", "refine.nsp"),
        ("data: {max_len: 4}", "data.max_len", "data.max_length"),
        ("trainer: {save_frequency: 4}", "trainer.save_frequency", "trainer.save_freq"),
        (
            "actor_rollout_ref: {actor: {optim: {learning_rate: 1}}}",
            "actor_rollout_ref.actor.optim.learning_rate",
            None,
        ),
        ("actor_rollout_ref: {actor: {optim: {beta: 1}}}", "actor_rollout_ref.actor.optim.beta", "betas"),
        ("lr: 1", "lr", "actor_rollout_ref.actor.optim.lr"),
        ("model: {pth: DIR}", "model.pth", "model.path"),
        ("refine: {nowhere: {}}", "refine.nowhere", None),
        (
            "actor_rollout_ref: {actor: {fsdp_config: {mixed_precision: {param_type: bf16}}}}",
            "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_type",
            "param_dtype",
        ),
    ],
)
def test_unknown_keys_of_a_recipe_are_refused_wherever_they_are(
    recipe_file: RecipeFile, text: str, key: str, nearest: str | None
) -> None:
    path = recipe_file("mine", f"defaults: [quickstart, _self_]\n{text}\n")
    error = refusal(compose_config(["recipe=mine"]))
    assert error.key == key
    assert f"unknown key (in {path})" in str(error)
    if nearest is not None:
        assert f"{nearest}'?" in str(error)


def test_an_unknown_key_of_a_preset_names_the_preset(recipe_file: RecipeFile) -> None:
    path = recipe_file("mine", "confg: {model_type: delta_net}\n", folder="model")
    error = refusal(compose_config(["recipe=quickstart", "model=mine"]))
    assert error.key == "model.confg"
    assert str(path) in str(error) and "'model.config'" in str(error)


def test_sections_with_keys_of_the_users_own_stay_open(quickstart: DictConfig) -> None:
    config = changed(
        quickstart,
        ray_kwargs__ray_init__include_dashboard=False,
        ray_kwargs__ray_init__runtime_env__env_vars={"A": "1"},
        actor_rollout_ref__actor__optim__override_optimizer_config={"eps": 1e-6},
        model__config__allow_neg_eigval=True,
    )
    assert validate(config).config.ray_kwargs.ray_init.include_dashboard is False


def test_fields_of_verls_dataclasses_that_its_yaml_leaves_out_are_known(quickstart: DictConfig) -> None:
    error = refusal(changed(quickstart, actor_rollout_ref__actor__ppo_infer_micro_batch_size_per_gpu=2))
    assert "would have no effect" in str(error) and "unknown key" not in str(error)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("actor_rollout_ref.actor.optim.lr", "fast", "takes a number, got 'fast'"),
        ("actor_rollout_ref.actor.shuffle", 1, "takes true or false, got 1"),
        ("refine", 3, "takes a section with the keys "),
        ("trainer.project_name", {"a": 1}, "takes a string"),
    ],
)
def test_values_of_the_wrong_kind(quickstart: DictConfig, key: str, value: object, message: str) -> None:
    error = refusal(changed(quickstart, **{key.replace(".", "__"): value}))
    assert error.key == key and message in str(error)


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (
            {"refine__ppo_mini_batch_size": 7},
            "refine.ppo_mini_batch_size",
            "7 does not divide .*=16. 4 or 8 would",
        ),
        ({"data__train_max_samples": 15}, "data.train_max_samples", "15 sequences do not fill a batch of .*=16"),
        ({"data__train_max_samples": None}, "data.train_max_samples", "must be an integer"),
        ({"data__val_batch_size": 0}, "data.val_batch_size", "at least 1"),
        ({"data__max_prompt_length": 7}, "data.max_prompt_length", "7 has no effect .* Set data.max_length"),
        ({"trainer__val_only": True, "data__val_files": None}, "trainer.val_only", "set data.val_files"),
        ({"trainer__logger": None}, "trainer.logger", r"Write \[\]"),
        (
            {"actor_rollout_ref__model__override_config__hidden_size": 64},
            "actor_rollout_ref.model.override_config.hidden_size",
            "behind the back of all checks",
        ),
        ({"refine__ppo_mini_batch_size": 32}, "refine.ppo_mini_batch_size", "32 is more than .*=16"),
        (
            {"trainer__n_gpus_per_node": 3},
            "refine.ppo_mini_batch_size",
            "8 cannot be shared equally by 3 workers",
        ),
        ({"trainer__nnodes": 16}, "refine.ppo_mini_batch_size", "by 16 workers"),
        (
            {
                "refine__gradient_snr_every": 2,
                "trainer__n_gpus_per_node": 8,
                "actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu": 1,
            },
            "refine.gradient_snr_every",
            r"is 1 document .*=8 over 8 workers\). Set refine.ppo_mini_batch_size to 16 or more",
        ),
        (
            {"refine__gradient_snr_every": 9, "trainer__total_training_steps": 8},
            "refine.gradient_snr_every",
            "9 is more than trainer.total_training_steps=8",
        ),
        (
            {
                "refine__gradient_snr_every": 3,
                "trainer__total_training_steps": 5,
                "refine__warmup_steps": 4,
            },
            "refine.gradient_snr_every",
            "3: none of the steps 5 to 5, which have rollouts",
        ),
        (
            {"actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu": 3},
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
            "3 does not divide a worker's share of a mini-batch, 8 .*2 or 4 would",
        ),
        (
            {"actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu": None},
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
            "must be an integer, got None",
        ),
        ({"data__train_batch_size": 0}, "data.train_batch_size", "at least 1"),
        (
            {"data__max_length": 12},
            "data.max_length",
            "12 is too short: .*chunks=8 .*length=5 .*at least 13 tokens",
        ),
        ({"data__min_length": 12}, "data.min_length", "12 would keep documents that are too short.* 13 or"),
        ({"refine__nsp__chunks": 508}, "data.max_length", "512 is too short.*at least 513"),
        ({"data__train_files": None}, "data.train_files", "no documents given"),
        ({"data__seed": None}, "data.seed", "must be an integer"),
        ({"trainer__total_training_steps": 0}, "trainer.total_training_steps", "at least 1"),
        ({"trainer__n_gpus_per_node": 0}, "trainer.n_gpus_per_node", "at least 1"),
        ({"trainer__device": "gpu"}, "trainer.device", "unknown device 'gpu'. Allowed: cuda, cpu"),
        ({"actor_rollout_ref__actor__strategy": "fdsp2"}, "actor_rollout_ref.actor.strategy", "mean 'fsdp2'"),
        ({"model_engine": "megatron"}, "model_engine", "'megatron' is not supported"),
        ({"refine__nsp__group": "position"}, "refine.nsp.group", "rollouts_per_position=1"),
        ({"model__config": {}}, "model.path", "no model given"),
        ({"data__train_files": "???"}, "data.train_files", "needs a value"),
        (
            {"data__text_key": "${data.nowhere}"},
            "data.text_key",
            "cannot be resolved: .*'data.nowhere' not found",
        ),
    ],
)
def test_what_does_not_fit_together(quickstart: DictConfig, changes: dict[str, object], key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(changed(quickstart, **changes))
    assert caught.value.key == key


def test_settings_of_the_documents_are_checked_too(quickstart: DictConfig) -> None:
    with pytest.raises(ConfigError, match="data.long_documents: .*'windw'.*Did you mean 'window'"):
        validate(changed(quickstart, data__long_documents="windw"))


def test_lengths_at_the_limit_pass_and_min_length_is_filled_in(quickstart: DictConfig) -> None:
    valid = validate(changed(quickstart, data__max_length=13))
    assert valid.data.min_length == valid.config.data.min_length == 13
    assert validate(changed(quickstart, data__min_length=100)).data.min_length == 100


def test_workers_share_a_batch(quickstart: DictConfig) -> None:
    config = changed(
        quickstart,
        trainer__n_gpus_per_node=2,
        trainer__nnodes=2,
        actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu=2,
    )
    assert validate(config).workers == 4


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_a_verl_key_cannot_leave_the_short_key_it_follows(quickstart: DictConfig, follower: str) -> None:
    value = "DIR" if follower.endswith("path") else 4
    error = refusal(changed(quickstart, **{follower.replace(".", "__"): value}))
    assert error.key == follower
    assert f"Set {FOLLOWERS[follower]} instead" in str(error)


@pytest.mark.parametrize("key", FIXED)
def test_verl_options_without_effect_are_refused_with_a_reason(quickstart: DictConfig, key: str) -> None:
    only, reason = FIXED[key]
    other = not only if isinstance(only, bool) else "async" if isinstance(only, str) else 5
    error = refusal(changed(quickstart, **{key.replace(".", "__"): other}))
    assert error.key == key and reason in str(error)


def test_paths_become_absolute_but_hub_ids_stay(quickstart: DictConfig, empty_directory: Path) -> None:
    (empty_directory / "checkpoint").mkdir()
    local = validate(changed(quickstart, model__path="checkpoint", trainer__default_local_dir="runs/a"))
    assert local.model.path == local.config.actor_rollout_ref.model.path == str(empty_directory / "checkpoint")
    assert local.config.trainer.default_local_dir == str(empty_directory / "runs/a")
    assert validate(changed(quickstart, model__path="fla-hub/x")).model.path == "fla-hub/x"


def test_the_configuration_given_is_not_changed(quickstart: DictConfig) -> None:
    before = OmegaConf.to_container(quickstart, resolve=False)
    validate(quickstart)
    assert OmegaConf.to_container(quickstart, resolve=False) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm__adv_estimator": "gpro"}, "unknown estimator 'gpro'.*Did you mean 'grpo'"),
        ({"algorithm__adv_estimator": "gae"}, "unknown estimator 'gae'"),
        ({"actor_rollout_ref__actor__policy_loss__loss_mode": "vanila"}, "Did you mean 'vanilla'"),
        (
            {"actor_rollout_ref__actor__loss_agg_mode": "mean"},
            "loss_agg_mode: unknown value 'mean'. Allowed: token-mean",
        ),
    ],
)
def test_what_verl_refuses_is_said_with_its_key(
    quickstart: DictConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_against_verl(validate(changed(quickstart, **changes)).config)


@pytest.mark.parametrize("name", UNSUPPORTED_LOSSES)
def test_policy_losses_that_cannot_be_used(quickstart: DictConfig, name: str) -> None:
    config = validate(changed(quickstart, actor_rollout_ref__actor__policy_loss__loss_mode=name)).config
    with pytest.raises(ConfigError, match=f"unknown policy loss '{name}'. Allowed: "):
        check_against_verl(config)
