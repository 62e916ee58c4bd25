"""verl's keys: those that act are listed, and any other is refused with what to use instead."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.acting_keys import ACTING, INSTEAD, ONLY_WITH, VERLS_LOSSES, acts, check_acting
from refine_verl.compose.composition import base_schema, compose_config
from refine_verl.compose.schema import leaves
from refine_verl.compose.validate import validate
from refine_verl.compose.verl_keys import FIXED, FOLLOWERS
from refine_verl.config import ConfigError, DataSettings, PromptSettings, list_settings

OWN = {setting.key for setting in list_settings(DataSettings, PromptSettings)}
GRPO = [
    "recipe=posttrain",
    "model=tiny_deltanet",
    "data.train_files=FILE",
    "refine.inner=none",
    "refine.outer=grpo",
    "trainer.n_gpus_per_node=1",
]


@pytest.fixture(scope="module")
def resolved() -> DictConfig:
    """A run of GRPO, resolved and checked."""
    return validate(compose_config(GRPO)).config


@pytest.fixture(scope="module")
def written() -> DictConfig:
    """The same as it is composed."""
    return OmegaConf.create(OmegaConf.to_container(compose_config(GRPO)))


def another(value: Any) -> Any:
    """A sound value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return ["other"] if isinstance(value, list) else "other"


def inert() -> list[str]:
    config = compose_config(GRPO)
    names = [key for key, _ in leaves(base_schema()) if not key.startswith(("refine.", "model."))]
    return [
        key
        for key in names
        if key not in FIXED
        and key not in FOLLOWERS
        and not any(key == name or key.startswith(f"{name}.") for name in OWN)
        and not acts(key, config)
    ]


def test_every_listed_key_is_one_of_verls() -> None:
    known = {key for key, _ in leaves(base_schema())}
    for key in ACTING:
        section = any(name.startswith(f"{key}.") for name in known)
        assert key in known or section or OmegaConf.select(base_schema(), key) == {}, key
    assert not set(ACTING) & (set(FIXED) | set(FOLLOWERS) | OWN | set(INSTEAD))


def test_the_defaults_of_every_recipe_pass(resolved: DictConfig) -> None:
    check_acting(resolved)


@pytest.mark.parametrize("key", ONLY_WITH)
def test_keys_that_act_with_another_choice_only(written: DictConfig, key: str) -> None:
    other, choice = ONLY_WITH[key][0]
    config = copy.deepcopy(written)
    OmegaConf.update(config, key, another(OmegaConf.select(config, key)), merge=False)
    OmegaConf.resolve(config)
    with pytest.raises(ConfigError, match=f"no effect: it is read with {other}=") as caught:
        check_acting(config)
    assert caught.value.key == key
    OmegaConf.update(config, other, choice, merge=False)
    check_acting(config)
    if other.endswith(".loss_mode"):
        OmegaConf.update(config, other, "mine", merge=False)  # a loss of a user's may read it
        check_acting(config)


def test_the_losses_whose_keys_are_known_are_verls() -> None:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    assert set(VERLS_LOSSES) <= set(map(str, POLICY_LOSS_REGISTRY))


@pytest.mark.parametrize("part", range(8))
def test_any_other_key_is_refused(written: DictConfig, part: int) -> None:
    keys = inert()
    assert len(keys) > 600
    for key in keys[part::64]:
        config = copy.deepcopy(written)
        OmegaConf.update(config, key, another(OmegaConf.select(config, key, throw_on_missing=False)), merge=False)
        OmegaConf.resolve(config)
        with pytest.raises(ConfigError, match="no effect") as caught:
            check_acting(config)
        assert caught.value.key == key


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("reward.reward_model.enable=true", "reward.custom_reward_function.path"),
        ("reward_model.enable=true", "reward.custom_reward_function.path"),
        ("reward.reward_manager.name=nonsense", "reward.custom_reward_function.path"),
        ("reward_model.reward_manager=dapo", "reward.custom_reward_function.path"),
        ("data.tokenizer=DIR", "set model.tokenizer"),
        ("actor_rollout_ref.rollout.val_kwargs.n=4", "one greedy answer"),
        ("actor_rollout_ref.rollout.val_kwargs.temperature=0.7", "one greedy answer"),
        ("actor_rollout_ref.rollout.do_sample=false", "refine.answers.temperature"),
        ("actor_rollout_ref.rollout.response_length=7", "set data.max_new_tokens"),
        ("actor_rollout_ref.rollout.ignore_eos=true", "come from the training workers"),
        ("actor_rollout_ref.rollout.name=vllm", "come from the training workers"),
        ("data.filter_overlong_prompts=true", "set data.overlong_prompts"),
        ("data.truncation=left", "set data.overlong_prompts"),
        ("data.max_response_length=7", "set data.max_new_tokens"),
        ("data.return_raw_chat=false", "set data.chat_template"),
        ("actor_rollout_ref.model.use_fused_kernels=true", "ppo_micro_batch_size_per_gpu"),
        ("actor_rollout_ref.actor.fsdp_config.strategy=fsdp", "set actor_rollout_ref.actor.strategy"),
        ("algorithm.gamma=0.5", "one advantage for all of its tokens"),
        ("algorithm.lam=0.5", "without a critic"),
        ("critic.optim.lr=1", "without a critic"),
        ("+actor_rollout_ref.rollout.engine_kwargs.sglang.x=1", "come from the training workers"),
        ("+actor_rollout_ref.rollout.engine_kwargs.vllm.x=1", "read with refine.answers.engine=vllm only"),
        ("actor_rollout_ref.rollout.max_num_seqs=7", "read with refine.answers.engine=vllm only"),
        ("+data.apply_chat_template_kwargs.enable_thinking=false", "data.chat_template=true"),
        ("reward.custom_reward_function.name=score", "no effect without reward.custom_reward_function.path"),
    ],
)
def test_what_to_use_instead(override: str, instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose_config([*GRPO, override]))
    assert instead in str(caught.value)
    assert caught.value.key == override.partition("=")[0].lstrip("+")


def test_gamma_acts_where_answers_are_discounted() -> None:
    validate(compose_config([*GRPO, "algorithm.gamma=0.5", "algorithm.adv_estimator=reinforce_plus_plus"]))


def test_a_default_written_out_passes() -> None:
    given = ["data.truncation=error", "actor_rollout_ref.rollout.name=nsp", "data.max_response_length=5"]
    validate(compose_config([*GRPO, *given, "refine.nsp.rollout_length=5"]))


@pytest.mark.parametrize("place", ["reward.custom_reward_function", "custom_reward_function"])
def test_a_function_for_answers_in_both_places(place: str) -> None:
    given = [f"{place}.path=scores.py", f"{place}.name=mine", f"+{place}.reward_kwargs.share=0.5"]
    config = validate(compose_config([*GRPO, *given])).config
    assert config.reward.custom_reward_function == {
        "path": "scores.py",
        "name": "mine",
        "reward_kwargs": {"share": 0.5},
    }


def test_a_function_that_would_score_nothing() -> None:
    with pytest.raises(ConfigError, match=r"reward.custom_reward_function.path: scores.py has no effect .*outer=sft"):
        validate(compose_config([*GRPO[:-2], "refine.outer=sft", "reward.custom_reward_function.path=scores.py"]))
    both = ["custom_reward_function.path=a.py", "reward.custom_reward_function.path=b.py"]
    with pytest.raises(ConfigError, match=r"b.py contradicts custom_reward_function.path=a.py"):
        validate(compose_config([*GRPO, *both]))


@pytest.mark.parametrize("section", ["trainer", "ray_kwargs", "ray_kwargs.ray_init", "refine.loss", "critic.optim"])
def test_a_section_is_not_null(section: str) -> None:
    with pytest.raises(ConfigError, match="takes a section with the keys") as caught:
        validate(compose_config([*GRPO, f"{section}=null"]))
    assert caught.value.key == section


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.seed=99999999999999999999999", "must be at most 9223372036854775807"),
        ("data.train_batch_size=99999999999999999999999", "must be at most 9223372036854775807"),
        ("data.dataloader_num_workers=-1", "must be at least 0"),
        ("data.cache_dir=true", "must be a string or null, got True"),
        ("trainer.resume_from_path=/some/where", "has no effect with trainer.resume_mode=auto"),
        ("actor_rollout_ref.model.external_lib=true", "takes a name"),
        ("actor_rollout_ref.actor.checkpoint.load_contents=nan", "takes a list"),
        ("actor_rollout_ref.actor.loss_agg_mode=nan", "Allowed: token-mean"),
        ("actor_rollout_ref.actor.optim.weight_decay=-1", "must be at least 0"),
        ("actor_rollout_ref.actor.optim.betas=[0.9,1.5]", "must be less than 1, got 1.5"),
        ("actor_rollout_ref.actor.optim.lr_warmup_steps=-99999999999999999999999", "must be at least -1"),
        ("data.task='  '", "is empty"),
    ],
)
def test_values_that_only_a_worker_would_notice(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose_config([*GRPO, override]))
    assert message in str(caught.value)
    assert caught.value.key == override.partition("=")[0]
