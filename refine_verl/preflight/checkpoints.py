"""Whether the checkpoint a run would resume from fits it, asked before Ray starts and anything is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PretrainedConfig

from refine_verl.config import ConfigError, LoraSettings, require_choice
from refine_verl.models.stored_types import only_safe_types, unsafe_content
from refine_verl.record.checkpoint_files import MANIFEST, STEP, TRACKER, candidates, damage

logger = logging.getLogger(__name__)

RESUME_MODES = ("auto", "disable", "resume_path")
# What a checkpoint of verl's FSDP engine holds of each kind of content, per rank.
_SHARDS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
# Settings of a model that say nothing of its weights or of what it computes with them.
_NOT_THE_MODEL = {
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_ANOTHER = f"trainer.resume_mode=resume_path trainer.resume_from_path=RUN/{STEP}N"
_START_OVER = "start over with another trainer.default_local_dir or with trainer.resume_mode=disable"


def checkpoint_to_resume(config: DictConfig, *, warn: bool = True) -> Path | None:
    """The checkpoint directory ``global_step_N`` that the run resumes from, None for a fresh run.

    With ``trainer.resume_mode=auto`` the last one that is not damaged.

    Args:
        config: the resolved configuration.
        warn: name the damaged checkpoints that are passed over, and say what cannot be checked.

    Raises:
        ConfigError: an unknown ``trainer.resume_mode``; or the checkpoint it names does not exist or is damaged; or
            there are checkpoints, but no good one.
    """
    trainer = config.trainer
    mode = trainer.resume_mode
    require_choice("trainer.resume_mode", mode, RESUME_MODES)
    if mode == "disable":
        return None
    if mode == "auto":
        return _last_good(Path(trainer.default_local_dir), warn)
    given = trainer.resume_from_path
    if not isinstance(given, str) or not Path(given).name.startswith(STEP):
        raise ConfigError(
            "trainer.resume_from_path",
            f"must name a checkpoint directory RUN/{STEP}N with trainer.resume_mode=resume_path, got {given!r}.",
        )
    if not Path(given).is_dir():
        raise ConfigError("trainer.resume_from_path", f"{given}: no such directory.")
    problem = damage(Path(given))
    if problem:
        raise ConfigError(
            "trainer.resume_from_path", f"the checkpoint {given} is damaged: {problem}. Name another one."
        )
    if warn:
        _warn_without_manifest(Path(given))
    return Path(given)


@contextmanager
def reading_checkpoint(config: DictConfig) -> Iterator[Path | None]:
    """What :func:`checkpoint_to_resume` returns. Within, ``config`` names it to verl, and torch reads data only."""
    folder = checkpoint_to_resume(config)
    trainer = config.trainer
    asked = trainer.resume_mode, trainer.resume_from_path
    trainer.resume_mode, trainer.resume_from_path = (
        ("disable", None) if folder is None else ("resume_path", str(folder))
    )
    try:
        with only_safe_types():
            yield folder
    finally:
        trainer.resume_mode, trainer.resume_from_path = asked


def _last_good(run_dir: Path, warn: bool) -> Path | None:
    found = candidates(run_dir)
    tried: list[str] = []
    for folder in found:
        problem = damage(folder)
        if problem is None:
            if tried and warn:
                logger.warning("%s. The run resumes from %s instead", "; ".join(tried), folder)
            if warn:
                _warn_without_manifest(folder)
            return folder
        tried.append(f"the checkpoint {folder} is damaged: {problem}")
    if not found and not (run_dir / TRACKER).exists():
        return None
    raise ConfigError(
        "trainer.default_local_dir",
        f"no checkpoint of {run_dir} can be loaded ({'; '.join(tried) or f'{TRACKER} is there, but no {STEP}N'}). "
        f"Put a copy of one back, name one elsewhere with {_ANOTHER}, or {_START_OVER}.",
    )


def _warn_without_manifest(folder: Path) -> None:
    """verl writes none, nor did early versions of this package: what has none stays usable."""
    if not (folder / MANIFEST).is_file():
        logger.warning(
            "the checkpoint %s has no %s: its shards are there and not cut short, but whether their content is what "
            "was written cannot be checked",
            folder,
            MANIFEST,
        )


def check_checkpoint(config: DictConfig, model: PretrainedConfig, lora: LoraSettings | None = None) -> Path | None:
    """Check that the run can resume from its checkpoint, if it has one.

    Args:
        config: the resolved configuration.
        model: configuration of the model the run would train.
        lora: the adapters it would train; None: none.

    Returns:
        The checkpoint directory, None for a fresh run.

    Raises:
        ConfigError: there is a checkpoint, but of another number of workers or another model, one that lacks what
            is to be loaded or holds what could run code, or no good one.
    """
    folder = checkpoint_to_resume(config, warn=False)  # said when the run starts
    if folder is None:
        return None
    actor = folder / "actor"
    _check_world_size(config, folder, _read_json(actor / "fsdp_config.json", folder).get("world_size"))
    _check_shards(config, folder)
    wanted = json.loads(model.to_json_string(use_diff=False))
    _check_adapters(folder, lora or LoraSettings())
    _check_model(folder, _read_json(actor / "huggingface" / "config.json", folder), wanted)
    return folder


def _check_world_size(config: DictConfig, folder: Path, saved: Any) -> None:
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if saved != workers:
        raise ConfigError(
            "trainer.n_gpus_per_node",
            f"this run has {workers} worker(s) (trainer.n_gpus_per_node * trainer.nnodes), but the checkpoint "
            f"{folder} was written by {saved} and can only be resumed by as many. Ask for {saved}, or "
            f"{_START_OVER}.",
        )


def _check_shards(config: DictConfig, folder: Path) -> None:
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    contents = config.actor_rollout_ref.actor.checkpoint.load_contents
    for content, name in _SHARDS.items():
        if content not in contents:
            continue
        for rank in range(workers):
            file = folder / "actor" / f"{name}_world_size_{workers}_rank_{rank}.pt"
            if not file.is_file():
                raise ConfigError(
                    "trainer.resume_mode",
                    f"the checkpoint {folder} has no {file.name}, but actor_rollout_ref.actor.checkpoint.load_contents "
                    f"names {content}. Leave it out there, resume an earlier one with {_ANOTHER}, or {_START_OVER}.",
                )
            _check_content(folder, file)
    if (folder / "data.pt").is_file():
        _check_content(folder, folder / "data.pt")


def _check_adapters(folder: Path, lora: LoraSettings) -> None:
    """verl notes the rank of adapters in a checkpoint that has some."""
    note = folder / "actor" / "lora_train_meta.json"
    saved = _read_json(note, folder) if note.is_file() else {"r": 0}
    alpha = lora.lora_alpha if lora.lora_rank and lora.lora_adapter_path is None else saved.get("lora_alpha")
    if (saved.get("r"), saved.get("lora_alpha")) != (lora.lora_rank, alpha):
        there = f"adapters of rank {saved['r']} and alpha {saved.get('lora_alpha')}" if saved["r"] else "no adapters"
        raise ConfigError(
            f"{lora.SECTION}.lora_rank",
            f"this run has lora_rank={lora.lora_rank} lora_alpha={lora.lora_alpha}, and the checkpoint {folder}, which "
            f"it would resume, has {there}. Ask for the same, or {_START_OVER}.",
        )


def _check_content(folder: Path, file: Path) -> None:
    """Reading a pickle may run code: of one that could, nothing is read."""
    problem = unsafe_content(file)
    if problem:
        raise ConfigError(
            "trainer.resume_mode",
            f"{file.relative_to(folder)} of the checkpoint {folder} is not read: {problem}. Reading it could run code "
            f"of whoever wrote it. Resume an earlier one with {_ANOTHER}, or {_START_OVER}.",
        )


def _check_model(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = sorted((saved.keys() & wanted.keys()) - _NOT_THE_MODEL)
    different = [
        f"{name}={wanted[name]} instead of {saved[name]}"
        for name in names
        if not name.startswith("_") and saved[name] != wanted[name]
    ]
    if different:
        shown = ", ".join(different[:5]) + (", ..." if len(different) > 5 else "")
        raise ConfigError(
            "model",
            f"this run's model is not that of the checkpoint {folder}, which it would resume ({shown}). "
            f"Choose the same model, or {_START_OVER}.",
        )


def _read_json(file: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "trainer.resume_mode", f"the checkpoint {folder} cannot be read: {file}: {error}. Or {_START_OVER}."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            "trainer.resume_mode", f"the checkpoint {folder} cannot be read: {file} is no object. Or {_START_OVER}."
        )
    return content
