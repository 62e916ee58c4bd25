"""The dataclasses: defaults, every refusal with its key, and that they stay light."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest

from refine_verl.config import (
    REWARDS,
    SELECTIONS,
    AnswerSettings,
    ConfigError,
    DataSettings,
    LossSettings,
    ModelSettings,
    NSPSettings,
    PromptSettings,
    RefineSettings,
    TTTSettings,
    list_settings,
)

SECTIONS = (RefineSettings, NSPSettings, LossSettings, AnswerSettings, TTTSettings, ModelSettings)


def refine(**nsp: Any) -> RefineSettings:
    return RefineSettings.from_mapping({"nsp": nsp})


def test_defaults_are_the_papers_mid_training_settings() -> None:
    settings = RefineSettings()
    assert settings.nsp == NSPSettings(
        chunks=8,
        rollout_length=5,
        rollouts_per_position=1,
        selection="entropy",
        anchor="prediction",
        entropy_temperature=1.0,
        smoothing_window=None,
        temperature=1.0,
        reward="cosine",
        group="sequence",
        grad_scope="full",
        rollout="fork",
    )
    assert settings.loss == LossSettings(rl_coef=0.2, sft_coef=1.0)
    assert (settings.ppo_mini_batch_size, settings.warmup_steps) == (32, 0)


def test_from_mapping_fills_in_defaults_and_accepts_integers_for_numbers() -> None:
    settings = RefineSettings.from_mapping({"nsp": {"chunks": 2, "temperature": 2}, "loss": None})
    assert settings.nsp.chunks == 2
    assert settings.nsp.temperature == 2.0 and isinstance(settings.nsp.temperature, float)
    assert settings.loss == LossSettings()


def test_settings_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NSPSettings().chunks = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        NSPSettings(8)  # type: ignore[call-arg, misc]


def test_pooling_window_and_shortest_document_follow_the_rollout_length() -> None:
    assert NSPSettings(rollout_length=7).pooling_window == 7
    assert NSPSettings(rollout_length=7, smoothing_window=3).pooling_window == 3
    assert NSPSettings(chunks=8, rollout_length=5).shortest_document == 13


@pytest.mark.parametrize(
    ("key", "mapping", "message"),
    [
        ("refine.nps", {"nps": {}}, "unknown key.*Did you mean 'nsp'"),
        ("refine.nsp.chunk", {"nsp": {"chunk": 4}}, "unknown key.*Did you mean 'chunks'"),
        ("refine.loss.rl_coeff", {"loss": {"rl_coeff": 1}}, "unknown key.*Did you mean 'rl_coef'"),
        ("refine.nsp", {"nsp": 3}, "section with keys"),
        ("refine.nsp.chunks", {"nsp": {"chunks": "8"}}, "must be an integer, got '8'"),
        ("refine.nsp.chunks", {"nsp": {"chunks": True}}, "must be an integer, got True"),
        ("refine.nsp.chunks", {"nsp": {"chunks": 8.5}}, "must be an integer, got 8.5"),
        ("refine.nsp.chunks", {"nsp": {"chunks": None}}, "needs a value .an integer., got null"),
        ("refine.nsp.chunks", {"nsp": {"chunks": 0}}, "at least 1, got 0"),
        ("refine.nsp.rollout_length", {"nsp": {"rollout_length": 0}}, "at least 1, got 0"),
        ("refine.nsp.rollouts_per_position", {"nsp": {"rollouts_per_position": -1}}, "at least 1"),
        ("refine.nsp.smoothing_window", {"nsp": {"smoothing_window": 0}}, "at least 1"),
        ("refine.nsp.temperature", {"nsp": {"temperature": 0}}, "greater than 0"),
        ("refine.nsp.temperature", {"nsp": {"temperature": float("inf")}}, "finite"),
        ("refine.nsp.temperature", {"nsp": {"temperature": float("nan")}}, "finite"),
        ("refine.nsp.entropy_temperature", {"nsp": {"entropy_temperature": -1.0}}, "greater than 0"),
        ("refine.nsp.selection", {"nsp": {"selection": "max entropy"}}, "no name of a function.*'max_entropy'"),
        ("refine.nsp.anchor", {"nsp": {"anchor": "predicton"}}, "Did you mean 'prediction'"),
        ("refine.nsp.group", {"nsp": {"group": "batch"}}, "Allowed: sequence, position"),
        ("refine.nsp.grad_scope", {"nsp": {"grad_scope": "none"}}, "Allowed: full, branch"),
        ("refine.nsp.rollout", {"nsp": {"rollout": "fokr"}}, "Did you mean 'fork'"),
        (
            "refine.nsp.reward",
            {"nsp": {"reward": ""}},
            "no name of a function. Allowed: cosine, binary",
        ),
        ("refine.nsp.reward", {"nsp": {"reward": "cosine."}}, "Did you mean 'cosine'"),
        ("refine.loss.rl_coef", {"loss": {"rl_coef": -0.1}}, "at least 0"),
        ("refine.loss.sft_coef", {"loss": {"sft_coef": "1"}}, "must be a number"),
        ("refine.ppo_mini_batch_size", {"ppo_mini_batch_size": 0}, "at least 1"),
        ("refine.warmup_steps", {"warmup_steps": -1}, "at least 0"),
        ("refine.loss", {"loss": {"rl_coef": 0, "sft_coef": 0}}, "nothing to learn"),
        ("refine.nsp.credit", {"nsp": {"credit": "token", "rollout_length": 1}}, "token has no effect with"),
        ("refine.nsp.group", {"nsp": {"group": "position"}}, "rollouts_per_position=1 leaves nothing"),
        ("refine.nsp.chunks", {"nsp": {"chunks": 1}}, "nothing to compare a reward with"),
        (
            "refine.nsp.entropy_temperature",
            {"nsp": {"selection": "uniform", "entropy_temperature": 2.0}},
            "no effect with refine.nsp.selection=uniform",
        ),
        ("refine.nsp.question_tokens", {"nsp": {"question_tokens": 0}}, "at least 1"),
        (
            "refine.nsp.question_tokens",
            {"nsp": {"selection": "surprise", "question_tokens": 9}},
            "no effect with refine.nsp.selection=surprise: remove it or set selection=query",
        ),
        (
            "refine.nsp.question_tokens",
            {"nsp": {"selection": "query", "question_tokens": 9}, "loss": {"rl_coef": 0}},
            "9 has no effect without rollouts",
        ),
        ("refine.nsp.rollouts_together", {"nsp": {"rollouts_together": 0}}, "must be at least 1, got 0"),
        (
            "refine.nsp.rollouts_together",
            {"nsp": {"rollout": "prefix", "rollouts_together": 9}},
            "9 has no effect with refine.nsp.rollout=prefix, which forks no states: leave it out",
        ),
        (
            "refine.nsp.rollouts_together",
            {"nsp": {"rollouts_together": 9}, "loss": {"rl_coef": 0}},
            "9 has no effect without rollouts",
        ),
        ("refine.warmup_steps", {"warmup_steps": 3, "loss": {"sft_coef": 0}}, "sft_coef=0"),
        ("refine.gradient_snr_every", {"gradient_snr_every": -1}, "at least 0"),
        ("refine.gradient_cosine", {"gradient_cosine": True}, "no effect with refine.gradient_snr_every=0.*Raise it"),
        (
            "refine.gradient_snr_every",
            {"gradient_snr_every": 2, "loss": {"rl_coef": 0}},
            "effect with refine.loss.rl_coef=0.* Set it to 0",
        ),
        (
            "refine.gradient_snr_every",
            {"gradient_snr_every": 2, "phase": "posttrain", "inner": "refine", "outer": "sft"},
            "phase=posttrain: .* Set it to 0",
        ),
    ],
)
def test_refused_with_key_value_and_cure(key: str, mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RefineSettings.from_mapping(mapping)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")


@pytest.mark.parametrize(
    "mapping",
    [
        {"nsp": {"group": "position", "rollouts_per_position": 2}},
        {"nsp": {"chunks": 1, "rollouts_per_position": 2}},
        {"nsp": {"chunks": 1, "group": "position"}, "loss": {"rl_coef": 0}},
        {"loss": {"sft_coef": 0}},
        {"gradient_snr_every": 10, "gradient_cosine": True, "on_policy": True},
        {"nsp": {"reward": "my_package.rewards.overlap"}},
        {"nsp": {"reward": "registered-by_a_package"}},
        {"nsp": {"selection": "my_package:turns", "entropy_temperature": 2.0}},
        {"nsp": {"selection": "my_package:turns", "question_tokens": 9}},
        {"nsp": {"selection": "query", "question_tokens": 9, "entropy_temperature": 2.0}},
        *({"nsp": {"reward": reward}} for reward in REWARDS),
        *({"nsp": {"selection": selection}} for selection in SELECTIONS),
    ],
)
def test_sensible_combinations_pass(mapping: dict[str, Any]) -> None:
    RefineSettings.from_mapping(mapping)


def test_model_tokenizer_is_the_given_one_then_the_checkpoints_then_the_presets() -> None:
    config = {"model_type": "delta_net"}
    given = ModelSettings(path="DIR", tokenizer="bytes", config=config, config_tokenizer="bpe:512")
    assert given.tokenizer_source == "bytes"
    assert given.init_config is None and not given.random_weights
    assert ModelSettings(path="DIR", config=config, config_tokenizer="bpe:512").tokenizer_source == "DIR"
    preset = ModelSettings(config=config, config_tokenizer="bpe:512")
    assert preset.tokenizer_source == "bpe:512"
    assert preset.random_weights and preset.init_config == config


@pytest.mark.parametrize(
    ("key", "mapping", "message"),
    [
        ("model.path", {}, "no model given.*model=tiny_deltanet"),
        ("model.path", {"path": " "}, "is empty"),
        ("model.path", {"path": 3}, "must be a string or null"),
        ("model.tokenizer", {"config": {"model_type": "delta_net"}}, "needs a tokenizer"),
        ("model.config", {"config": "delta_net"}, "must be a mapping"),
        (
            "model.activation_checkpointing",
            {"path": "DIR", "activation_checkpointing": "segments"},
            "Did you mean 'segment'",
        ),
        ("model.activation_chekpointing", {"path": "DIR", "activation_chekpointing": "none"}, "Did you mean"),
    ],
)
def test_model_settings_refused(key: str, mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelSettings.from_mapping(mapping)
    assert caught.value.key == key


def test_every_key_is_listed_once_with_a_meaning() -> None:
    listed = {setting.key: setting for setting in list_settings()}
    fields = [
        f"{section.SECTION}.{field.name}"
        for section in (*SECTIONS, DataSettings, PromptSettings)
        for field in dataclasses.fields(section)
        if field.name not in ("nsp", "loss", "answers", "ttt")
    ]
    assert list(listed) == list(dict.fromkeys(fields))  # documents and prompts have keys in common
    assert all(setting.help for setting in listed.values())
    assert listed["refine.nsp.chunks"].default == 8
    assert (listed["data.max_length"].default, listed["data.num_workers"].default) == (16384, None)
    assert listed["refine.nsp.grad_scope"].choices == ("full", "branch")
    assert all(name in listed["refine.nsp.selection"].help for name in SELECTIONS)
    assert all(name in listed["refine.nsp.reward"].help for name in REWARDS)


def test_importing_the_settings_loads_nothing_heavy() -> None:
    heavy = "torch", "ray", "verl", "transformers", "fla", "datasets", "vllm"
    code = (
        "import sys, refine_verl.config\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"inner": "refine"}, "refine.inner"),
        ({"outer": "sft"}, "refine.outer"),
        ({"phase": "posttrain"}, "refine.outer"),
        ({"phase": "posttrain", "outer": "dpo"}, "refine.outer"),
        ({"phase": "ttt"}, "refine.inner"),
        ({"phase": "ttt", "inner": "refine", "outer": "sft"}, "refine.outer"),
        ({"phase": "ttt", "inner": "refine", "warmup_steps": 1}, "refine.warmup_steps"),
        ({"phase": "ttt", "inner": "refine", "loss": {"rl_coef": 0}}, "refine.loss.rl_coef"),
        ({"phase": "ttt", "inner": "sft", "loss": {"sft_coef": 0}}, "refine.loss.sft_coef"),
        ({"phase": "ttt", "inner": "sft", "ttt": {"reset": "never"}}, "refine.ttt.reset"),
        ({"phase": "ttt", "inner": "sft", "ttt": {"steps": 0}}, "refine.ttt.steps"),
        ({"ttt": {"steps": 2}}, "refine.ttt"),
        ({"phase": "posttrain", "outer": "sft", "answers": {"samples": 4}}, "refine.answers"),
        ({"phase": "posttrain", "outer": "grpo", "answers": {"samples": 1}}, "refine.answers.samples"),
    ],
)
def test_phases_refuse_what_has_no_effect_in_them(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)) as caught:
        RefineSettings.from_mapping(changes)
    assert caught.value.key == key


def test_which_phases_make_rollouts() -> None:
    def uses(**changes: object) -> bool:
        return RefineSettings.from_mapping(changes).uses_rollouts

    assert uses() and not uses(loss={"rl_coef": 0})
    assert uses(phase="posttrain", inner="refine", outer="grpo")
    assert not uses(phase="posttrain", inner="sft", outer="sft") and not uses(phase="posttrain", outer="sft")
    assert uses(phase="ttt", inner="refine") and not uses(phase="ttt", inner="sft")
