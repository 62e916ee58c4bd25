"""What differs between documents, post-training and test-time training before a run starts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from refine_verl.config import ConfigError, RefineSettings
from refine_verl.data import DataSettings
from refine_verl.data.prompts_settings import PromptSettings
from refine_verl.data.settings import split_key
from refine_verl.schema import leaves

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from refine_verl.data.prompts import PreparedPrompts
    from refine_verl.validate import ValidConfig

DOCUMENT_KEYS: tuple[str, ...] = ("text_key", "min_length", "long_documents", "append_eos")
PROMPT_KEYS: tuple[str, ...] = (
    "prompt_key",
    "answer_key",
    "task_key",
    "task",
    "id_key",
    "chat_template",
    "answer_separator",
    "max_answer_length",
    "overlong_prompts",
    "max_new_tokens",
)
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


# Without torch


def check_phase(config: DictConfig, refine: RefineSettings, schema: DictConfig) -> None:
    """Refuse files and keys that the phase does not have.

    Args:
        config: resolved.
        refine: its ``refine:`` section.
        schema: `compose.base_schema()`, for the defaults.

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
    if refine.phase == "ttt":
        _check_ttt(config, refine)


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
            "returns to them. Answers are kept as they come and an interrupted run goes on behind them; set it to -1.",
        )


def data_settings(config: DictConfig, refine: RefineSettings) -> DataSettings | PromptSettings:
    """The typed ``data:`` section of the phase.

    Raises:
        refine_verl.data.DataError: a value that is not allowed.
    """
    section: Any = OmegaConf.to_container(config.data)
    return (DataSettings if refine.phase == "documents" else PromptSettings).from_mapping(section)


# With torch and datasets


def prompt_texts(settings: PromptSettings, characters: int) -> Iterator[str]:
    """Prompts to train a tokenizer on, the test prompts where there are no others; at most so many characters."""
    from refine_verl.data.prompts_read import read_prompts
    from refine_verl.data.sources import resolve_sources

    split = "train" if settings.train_files else "validation"
    sources = resolve_sources(settings.files(split), key=split_key(split), default_split=split)
    for row in read_prompts(sources, settings):
        texts = [row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt]
        yield from texts
        characters -= sum(map(len, texts))
        if characters <= 0:
            return


def prepare_prompt_splits(
    valid: ValidConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreparedPrompts, PreparedPrompts | None]:
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
    if validation is not None:
        _check_scores(validation.path, refine, "data.val_files")
    if refine.phase == "ttt":
        assert validation is not None
        _check_earlier_answers(valid.config, validation.path)
        return validation, validation
    _check_earlier_answers(valid.config, None)
    batch = int(valid.config.data.train_batch_size)
    train = prepare("train", minimum_sequences=batch, sequences_reason=f"data.train_batch_size={batch}")
    if refine.outer == "grpo":
        _check_scores(train.path, refine, "data.train_files")
    return train, validation


def _shortest_prompt(refine: RefineSettings) -> tuple[int, str]:
    nsp = refine.nsp
    if refine.inner == "refine":
        return nsp.shortest_document, (
            f"refine.nsp.chunks={nsp.chunks} positions need "
            f"refine.nsp.rollout_length={nsp.rollout_length} tokens after each"
        )
    if refine.inner == "sft":
        return 2, "a token is predicted from the one before"
    return 1, ""


def _check_scores(path: Path, refine: RefineSettings, key: str) -> None:
    """Score something for every task (and every row that names its own classes) before hours are spent on answers."""
    import datasets

    from refine_verl.data.prompts import place_of
    from refine_verl.evaluation import MetricError, score

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
            "go on from. Name another directory (and that run's model with model.path=RUN/model).",
        )
    if prepared is None or not answers.is_file():
        return
    now = DictConfig(OmegaConf.create(OmegaConf.to_yaml(config)))
    before, after = dict(_that_matter(earlier)), dict(_that_matter(now))
    changed = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    if list(earlier.data.val_files or []) != [str(prepared)]:
        changed.append("data.val_files: other prompts, or files written anew")
    if changed:
        raise ConfigError(
            "trainer.default_local_dir",
            f"{answers} holds answers of a run with other settings, which this one would go on from "
            f"({'; '.join(changed)}). Name another directory, or start over with trainer.resume_mode=disable.",
        )


def _that_matter(config: DictConfig) -> Iterator[tuple[str, Any]]:
    return (
        (key, value) for key, value in leaves(config) if key.startswith(_MATTERS) and not key.startswith(_MAY_CHANGE)
    )
