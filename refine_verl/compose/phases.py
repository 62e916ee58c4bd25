"""The keys that documents, post-training and test-time training have, and the rules between them."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig, OmegaConf

from refine_verl.config import ConfigError, DataSettings, FileSettings, PromptSettings, RefineSettings


def _keys(section: type[FileSettings], other: type[FileSettings]) -> tuple[str, ...]:
    """Keys of `section` without those of `other`, and without the limits, of which one follows the other."""
    left_out = {"max_length", "max_prompt_length", *(field.name for field in dataclasses.fields(other))}
    return tuple(field.name for field in dataclasses.fields(section) if field.name not in left_out)


DOCUMENT_KEYS = _keys(DataSettings, PromptSettings)
PROMPT_KEYS = _keys(PromptSettings, DataSettings)
REWARD_FUNCTION = "reward.custom_reward_function"


def check_phase(config: DictConfig, refine: RefineSettings, schema: DictConfig) -> None:
    """Refuse files and keys that the phase does not have.

    Args:
        config: resolved.
        refine: its ``refine:`` section.
        schema: `composition.base_schema()`, for the defaults.

    Raises:
        ConfigError: files missing, or a key without effect in this phase.
    """
    documents = refine.phase == "documents"
    for name in PROMPT_KEYS if documents else DOCUMENT_KEYS:
        if config.data[name] != schema.data[name]:
            raise ConfigError(
                f"data.{name}",
                f"{config.data[name]} has no effect with refine.phase={refine.phase}: it is about "
                f"{'prompts with answers' if documents else 'documents'}. Leave it out.",
            )
    if documents and config.data.max_prompt_length != config.data.max_length:
        raise ConfigError(
            "data.max_prompt_length",
            f"{config.data.max_prompt_length} has no effect with refine.phase=documents: it is about prompts with "
            "answers. Set data.max_length.",
        )
    if refine.nsp.selection == "query" and refine.uses_rollouts:
        _check_question(config, documents)
    if refine.phase == "ttt":
        _check_ttt(config, refine)


def _check_question(config: DictConfig, documents: bool) -> None:
    if documents:
        raise ConfigError(
            "refine.nsp.selection",
            "query looks for what resembles a prompt's question, and documents (refine.phase=documents) have none. Set "
            "entropy or surprise, or train on prompts (recipe=posttrain, recipe=ttt).",
        )
    if config.data.overlong_prompts == "right":
        raise ConfigError(
            "data.overlong_prompts",
            "right cuts off the end of long prompts, where refine.nsp.selection=query looks for the question. Set "
            "middle or left.",
        )


def _check_ttt(config: DictConfig, refine: RefineSettings) -> None:
    if not config.data.val_files:
        raise ConfigError("data.val_files", "no test prompts given. Set data.val_files=FILE, a directory or a list.")
    trainer = config.trainer
    for key, given, why in (
        ("data.train_files", config.data.train_files, "test-time training reads the prompts of data.val_files only"),
        ("trainer.total_training_steps", trainer.total_training_steps, "every test prompt is answered once"),
        ("trainer.test_freq", trainer.test_freq > 0 and trainer.test_freq, "the scores are recorded as they come"),
        (
            "trainer.total_epochs",
            trainer.total_epochs > 1 and trainer.total_epochs,
            "every test prompt is answered once",
        ),
        ("trainer.val_only", trainer.val_only, "answers without adaptation come with refine.ttt.baseline=true"),
    ):
        if given:
            raise ConfigError(key, f"{given} has no effect with refine.phase=ttt: {why}. Leave it out.")
    optim = config.actor_rollout_ref.actor.optim
    moves = optim.lr_scheduler_type != "constant" or optim.lr_warmup_steps_ratio > 0 or optim.lr_warmup_steps > 0
    if moves and (refine.ttt.reset != "none" or refine.ttt.steps > 1):
        raise ConfigError(
            "actor_rollout_ref.actor.optim",
            "a warm-up or a schedule needs steps that follow each other, and with refine.ttt.reset="
            f"{refine.ttt.reset} refine.ttt.steps={refine.ttt.steps} they start over, or pass several times within a "
            "batch. Leave lr_scheduler_type at constant, without warm-up.",
        )
    if trainer.save_freq > 0 and refine.ttt.reset != "none":
        raise ConfigError(
            "trainer.save_freq",
            f"{trainer.save_freq} would save the weights the run began with: refine.ttt.reset={refine.ttt.reset} "
            "returns to them. Answers are kept as they come and an interrupted run resumes after them; set it to -1.",
        )


def take_reward_function(config: DictConfig, refine: RefineSettings) -> None:
    """Move `custom_reward_function`, verl's older place, to `reward.custom_reward_function`, and check that it acts.

    Args:
        config: resolved; changed.
        refine: its ``refine:`` section.

    Raises:
        ConfigError: both places say something, or no answer would be scored by it.
    """
    older, section = config.custom_reward_function, config.reward.custom_reward_function
    for name, value in list(older.items()):
        if value is None:
            continue
        if name == "path" and section.path not in (None, value):
            raise ConfigError(REWARD_FUNCTION, f"{section.path} contradicts custom_reward_function.path={value}.")
        section[name], older[name] = value, None
    if section.path is None:
        for name, default in (("name", "compute_score"), ("reward_kwargs", {})):
            if (section[name] or default) != default:
                key = f"{REWARD_FUNCTION}.{name}"
                raise ConfigError(key, f"{section[name]} has no effect without {REWARD_FUNCTION}.path.")
    elif not isinstance(section.path, str) or not isinstance(section.name, str):
        raise ConfigError(
            REWARD_FUNCTION, f"takes a file and the name of a function, got {section.path}, {section.name}."
        )
    elif refine.phase != "posttrain" or refine.outer != "grpo":
        raise ConfigError(
            f"{REWARD_FUNCTION}.path",
            f"{section.path} has no effect with refine.phase={refine.phase} refine.outer={refine.outer}: it scores the "
            "answers of refine.phase=posttrain with refine.outer=grpo. Leave it out; refine.nsp.reward is that of "
            "rollouts.",
        )


def data_settings(config: DictConfig, refine: RefineSettings) -> DataSettings | PromptSettings:
    """The typed ``data:`` section of the phase.

    Raises:
        ConfigError: a value that is not allowed.
    """
    section: Any = OmegaConf.to_container(config.data)
    return (DataSettings if refine.phase == "documents" else PromptSettings).from_mapping(section)
