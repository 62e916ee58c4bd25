"""Prompts before a run starts: read, tokenised, scored once, and compared with what the run directory holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.schema import changes, leaves
from refine_verl.config import ConfigError, PromptSettings, RefineSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from refine_verl.compose.validate import ValidConfig
    from refine_verl.data.prepare import Prepared
    from refine_verl.data.statistics import PromptStatistics

PROMPT_DATASET = {"path": "pkg://refine_verl.data.prompts_dataset", "name": "VerlPromptDataset"}

# What answers depend on, less where things lie and how they are read.
_MATTERS: tuple[str, ...] = (
    "refine.",
    "model.",
    "data.",
    "algorithm.",
    "actor_rollout_ref.actor.",
    "actor_rollout_ref.model.",
)
_MAY_CHANGE: tuple[str, ...] = (
    "data.train_files",
    "data.val_files",
    "data.val_batch_size",
    "data.cache_dir",
    "data.custom_cls",
    "data.num_workers",
    "data.progress",
    "actor_rollout_ref.actor.profiler",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.tokenizer_path",
)


def prepare_prompt_splits(
    valid: ValidConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Prepared[PromptStatistics], Prepared[PromptStatistics] | None]:
    """Prompts and answers of both splits, checked and tokenised; for test-time training the test set is both.

    Raises:
        ConfigError: a task without a metric, or answers of other settings in the run directory.
        refine_verl.data.DataError: rows that cannot be used.
    """
    from refine_verl.data.prompts import prepare_prompts

    settings, refine = valid.data, valid.refine
    assert isinstance(settings, PromptSettings)
    minimum, reason = _shortest_prompt(refine)
    prepare = functools.partial(
        prepare_prompts, settings, tokenizer=tokenizer, minimum_prompt_length=minimum, reason=reason
    )
    validation = prepare("validation") if settings.val_files else None
    own_function = valid.config.reward.custom_reward_function.path is not None
    if validation is not None and not own_function:
        _check_scores(validation.path, refine, "data.val_files")
    if refine.phase == "ttt":
        assert validation is not None
        _check_earlier_answers(valid.config, validation.path)
        return validation, validation
    _check_earlier_answers(valid.config, None)
    batch = int(valid.config.data.train_batch_size)
    train = prepare("train", minimum_sequences=batch, sequences_reason=f"data.train_batch_size={batch}")
    if refine.outer == "grpo" and not own_function:
        _check_scores(train.path, refine, "data.train_files")
    return train, validation


def _shortest_prompt(refine: RefineSettings) -> tuple[int, str]:
    nsp = refine.nsp
    if refine.inner == "refine":
        return nsp.shortest_document, (
            f"refine.nsp.chunks={nsp.chunks} positions need "
            f"refine.nsp.rollout_length={nsp.longest_rollout} tokens after each"
        )
    if refine.inner == "sft":
        return 2, "a token is predicted from the one before"
    return 1, ""


def _check_scores(path: Path, refine: RefineSettings, key: str) -> None:
    """Score something for every task (and every row that names its own classes) before hours are spent on answers."""
    import datasets

    from refine_verl.data.prompts import place_of
    from refine_verl.scoring import MetricError, score

    table = datasets.load_from_disk(str(path)).select_columns(["task", "answers", "classes", "source", "row"])
    seen: set[tuple[str, bool]] = set()
    for index, row in enumerate(table):
        case = (row["task"], bool(row["classes"]))
        if case in seen:
            continue
        seen.add(case)
        try:
            score(row["task"], "x", list(row["answers"]), refine.answers.convention, classes=list(row["classes"] or []))
        except MetricError as error:
            raise ConfigError(key, f"{place_of(table, index)}: {error}") from error


def _check_earlier_answers(config: DictConfig, prepared: Path | None) -> None:
    """What is in the run directory already must be of this run: same phase, prompts, model and settings.

    Args:
        config: resolved.
        prepared: the test prompts, for test-time training.
    """
    directory = Path(config.trainer.default_local_dir)
    answers, written = directory / "predictions.jsonl", directory / "config.yaml"
    if config.trainer.resume_mode == "disable" or not written.is_file():
        return
    earlier = DictConfig(OmegaConf.load(written))
    phase = OmegaConf.select(earlier, "refine.phase", default="documents")
    if phase != config.refine.phase and (
        answers.is_file() or (directory / "latest_checkpointed_iteration.txt").is_file()
    ):
        raise ConfigError(
            "trainer.default_local_dir",
            f"{directory} holds a run of refine.phase={phase}, which one of refine.phase={config.refine.phase} cannot "
            "resume. Name another directory (and that run's model with model.path=RUN/model).",
        )
    if prepared is None or not answers.is_file():
        return
    now = DictConfig(OmegaConf.create(OmegaConf.to_yaml(config)))
    changed = changes(dict(_that_matter(earlier)), dict(_that_matter(now)))
    if list(earlier.data.val_files or []) != [str(prepared)]:
        changed.append("data.val_files: other prompts, or files written anew")
    if changed:
        raise ConfigError(
            "trainer.default_local_dir",
            f"{answers} holds answers of a run with other settings, which this one would continue "
            f"({'; '.join(changed)}). Name another directory, or start over with trainer.resume_mode=disable.",
        )


def _that_matter(config: DictConfig) -> Iterator[tuple[str, Any]]:
    return (
        (key, value) for key, value in leaves(config) if key.startswith(_MATTERS) and not key.startswith(_MAY_CHANGE)
    )
