"""Everything that can be wrong with a configuration, said before a model, Ray or a file is touched.

`validate` needs neither torch nor verl; `check_against_verl` asks verl's own checks and registries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from refine_verl.compose.acting_keys import check_acting
from refine_verl.compose.composition import base_schema
from refine_verl.compose.phases import check_phase, data_settings, take_reward_function
from refine_verl.compose.recipes import ConfigFile
from refine_verl.compose.schema import check_keys, leaves, missing_values
from refine_verl.compose.verl_keys import (
    ACTOR,
    RANKING_LOSSES,
    STRATEGIES,
    UNSUPPORTED_LOSSES,
    check_fixed,
    check_optimizer,
    check_verl_keys,
    require_number,
)
from refine_verl.config import (
    ConfigError,
    DataSettings,
    LoraSettings,
    ModelSettings,
    PromptSettings,
    RefineSettings,
    require_choice,
    require_names,
)

DEVICES = ("cuda", "cpu")
_INTEGERS = {
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "trainer.total_epochs": 1,
    "trainer.max_restarts": 0,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
    "data.seed": 0,
    "data.train_batch_size": 1,
    "data.train_max_samples": -1,
    "data.val_max_samples": -1,
    "data.val_batch_size": 1,
    "data.dataloader_num_workers": 0,
    f"{ACTOR}.ppo_epochs": 1,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": 1,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 1,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.max_num_seqs": 1,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 1,
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": 1,
}
"""Keys of verl that hold an integer, and the smallest it may be."""
_LARGEST = 2**63 - 1
"""What fits into the integers of torch and numpy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidConfig:
    """A configuration that passed `validate`.

    Attributes:
        config: resolved, without Hydra's section; run directory and local models are absolute paths.
        refine, model, data: its typed sections.
        lora: verl's keys of adapters.
        workers: number of training processes over all nodes.
    """

    config: DictConfig
    refine: RefineSettings
    model: ModelSettings
    data: DataSettings | PromptSettings
    lora: LoraSettings
    workers: int


def validate(config: DictConfig, files: Iterable[ConfigFile] = ()) -> ValidConfig:
    """Check everything that can be checked without torch and verl, and fill in what depends on other keys.

    Args:
        config: from `composition.compose_config`, or Hydra's without its own section. Not changed.
        files: the recipes and presets in use, to name the file of a wrong key.

    Raises:
        ConfigError: unknown key, wrong value, contradiction; the message has key, value and cure.
    """
    schema = base_schema()
    _check_groups(config)
    check_keys(config, schema, files)
    config = _resolved(config, schema)
    check_keys(config, schema, files)
    refine = RefineSettings.from_mapping(_section(config, "refine"))
    model = ModelSettings.from_mapping(_section(config, "model"))
    take_reward_function(config, refine)
    check_phase(config, refine, schema)
    _check_reading(model, refine)
    if refine.phase == "documents":
        _check_lengths(config, refine)
    data = data_settings(config, refine)
    workers = _check_trainer(config)
    _check_batches(config, refine, workers)
    check_fixed(config)
    check_verl_keys(config)
    lora = LoraSettings.of(_section(config.actor_rollout_ref, "model"))
    check_acting(config)
    _check_adapters(lora, refine, config.actor_rollout_ref.actor.checkpoint.save_contents)
    _make_paths_absolute(config)
    model = dataclasses.replace(model, path=config.model.path, tokenizer=config.model.tokenizer)
    refine = dataclasses.replace(refine, ttt=dataclasses.replace(refine.ttt, keep=config.refine.ttt.keep))
    lora = dataclasses.replace(lora, lora_adapter_path=config.actor_rollout_ref.model.lora_adapter_path)
    return ValidConfig(config=config, refine=refine, model=model, data=data, lora=lora, workers=workers)


def check_against_verl(config: DictConfig) -> None:
    """verl's own checks, and the names of its registries. Imports verl.

    Raises:
        ConfigError: unknown logger, advantage estimator or policy loss, an optimiser that cannot be made, or whatever
            verl refuses.
    """
    from hydra.errors import InstantiationException
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
    from verl.utils.config import validate_config
    from verl.utils.tracking import Tracking

    for name in [config.trainer.logger] if isinstance(config.trainer.logger, str) else config.trainer.logger:
        require_choice("trainer.logger", name, sorted(Tracking.supported_backend), kind="logger")
    estimators = sorted(str(name) for name in ADV_ESTIMATOR_REGISTRY if name != "gae")
    require_choice("algorithm.adv_estimator", config.algorithm.adv_estimator, estimators, kind="estimator")
    losses = sorted(str(name) for name in POLICY_LOSS_REGISTRY if name not in UNSUPPORTED_LOSSES)
    mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    require_choice("actor_rollout_ref.actor.policy_loss.loss_mode", mode, losses, kind="policy loss")
    check_optimizer(config.actor_rollout_ref.actor.optim)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # verl announces success
            validate_config(config, use_reference_policy=False, use_critic=False)
    except (AssertionError, ValueError, TypeError, KeyError, InstantiationException) as error:
        raise ConfigError("", f"verl refuses this configuration: {_readable_verl_error(error)}") from error


def _readable_verl_error(error: Exception) -> str:
    """verl's message with full dotted keys and without the Python around it."""
    cause = error.__cause__ if error.__cause__ is not None and not str(error.__cause__).startswith("<") else error
    text = " ".join(str(cause).split()) or _failed_line(cause)
    text = re.sub(r"^\[[\w.]+\] ", "", text)
    section = re.search(r"full_key: (\S+)", str(error))
    text = re.sub(r"(?<![\w.])actor\.(?=\w)", "actor_rollout_ref.actor.", text)
    return f"{text} (in {section[1]})" if section and section[1] not in text else text


def _failed_line(error: BaseException) -> str:
    """The source line that raised; verl has assertions without a message."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"`{frames[-1].line}` does not hold" if frames and frames[-1].line else type(error).__name__


def _check_groups(config: DictConfig) -> None:
    """Choices that bring whole sections with them; said first, or each of their keys would be unknown."""
    if config.model is not None and "_target_" in config.model:
        raise ConfigError("model", "this is a part of verl, not a model preset. See --help for the presets.")
    if config.model_engine != "dp":
        raise ConfigError(
            "model_engine", f"{config.model_engine!r} is not supported: states are forked under FSDP (dp)."
        )


def _resolved(config: DictConfig, schema: DictConfig) -> DictConfig:
    missing = sorted(missing_values(config) - missing_values(schema))
    if missing:
        raise ConfigError(missing[0], "needs a value: a recipe leaves it open (???).")
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    try:
        OmegaConf.resolve(resolved)
    except OmegaConfBaseException as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(_unresolvable_key(config), f"cannot be resolved: {first}.") from error
    assert isinstance(resolved, DictConfig)
    return resolved


def _unresolvable_key(config: DictConfig) -> str:
    for key, value in leaves(config):
        if isinstance(value, str) and "${" in value:
            try:
                OmegaConf.select(config, key)
            except OmegaConfBaseException:
                return key
    return ""


def _section(config: DictConfig, name: str) -> dict[str, Any]:
    container = OmegaConf.to_container(config[name])
    if not isinstance(container, dict):
        raise ConfigError(name, f"is a section with keys of its own, got {container!r}.")
    return {str(key): value for key, value in container.items()}


def _check_lengths(config: DictConfig, refine: RefineSettings) -> None:
    """c positions with k tokens after each need T >= c + k; fills in data.min_length."""
    needed = refine.nsp.shortest_document
    sum_of = (
        f"refine.nsp.chunks={refine.nsp.chunks} positions with refine.nsp.rollout_length="
        f"{refine.nsp.longest_rollout} tokens after each need at least {needed} tokens"
    )
    longest = config.data.max_length
    if longest is not None:
        require_number("data.max_length", longest, whole=True, at_least=1)
        if longest < needed:
            raise ConfigError(
                "data.max_length",
                f"{longest} is too short: {sum_of}. Raise data.max_length, or lower refine.nsp.chunks or "
                "refine.nsp.rollout_length.",
            )
    if config.data.min_length is None:
        config.data.min_length = needed
    require_number("data.min_length", config.data.min_length, whole=True, at_least=1)
    if config.data.min_length < needed:
        raise ConfigError(
            "data.min_length",
            f"{config.data.min_length} would keep documents that are too short: {sum_of}. Set it to {needed} or more, "
            "or leave it out.",
        )


def _check_reading(model: ModelSettings, refine: RefineSettings) -> None:
    key = "model.reading"
    if model.reading == "whole":
        return
    if not refine.uses_rollouts or refine.nsp.rollout == "prefix":
        raise ConfigError(key, f"{model.reading} has no effect without rollouts from forked states. Leave it out.")
    if refine.on_policy and model.activation_checkpointing == "none":
        raise ConfigError(
            key,
            f"{model.reading} has no effect with refine.on_policy=true and model.activation_checkpointing=none, where "
            "documents are read in the pass that is trained. Leave it out, or set activation_checkpointing=layer.",
        )


def _check_adapters(lora: LoraSettings, refine: RefineSettings, saved: Iterable[str]) -> None:
    if lora.lora_rank and "hf_model" in saved:
        raise ConfigError(
            f"{ACTOR}.checkpoint.save_contents",
            f"hf_model would write layers under the names they have with adapters ({lora.SECTION}.lora_rank="
            f"{lora.lora_rank}). Leave it out: the run writes its adapter, which python -m refine_verl.export merges.",
        )
    keep = refine.ttt.keep
    if keep is not None and lora.lora_rank and (problem := why_not_writable(Path(keep).expanduser())):
        raise ConfigError("refine.ttt.keep", f"{keep}: {problem}. Name another place.")
    if keep is not None and not lora.lora_rank:
        raise ConfigError(
            "refine.ttt.keep",
            f"{keep} keeps adapters, and there are none with {lora.SECTION}.lora_rank=0. Set lora_rank=16, "
            "say, or leave it out.",
        )


def _check_trainer(config: DictConfig) -> int:
    trainer = config.trainer
    for name in ("project_name", "experiment_name", "default_local_dir"):
        if not isinstance(trainer[name], (str, int)) or not str(trainer[name]).strip():
            raise ConfigError(f"trainer.{name}", f"must be a name, got {trainer[name]!r}. Leave it out instead.")
    if not config.data.train_files and config.refine.phase != "ttt":
        raise ConfigError("data.train_files", "no documents given. Set data.train_files=FILE, a directory or a list.")
    if trainer.val_only and not config.data.val_files:
        raise ConfigError("trainer.val_only", "true needs something to validate on: set data.val_files.")
    if trainer.logger is None:
        raise ConfigError("trainer.logger", "null is no list of loggers. Write [] for none.")
    require_names("trainer.logger", trainer.logger)
    require_names("actor_rollout_ref.model.external_lib", config.actor_rollout_ref.model.external_lib)
    for key, at_least in _INTEGERS.items():
        require_number(key, OmegaConf.select(config, key), whole=True, at_least=at_least, at_most=_LARGEST)
    for name in ("total_training_steps", "max_actor_ckpt_to_keep"):
        if trainer[name] is not None:
            require_number(f"trainer.{name}", trainer[name], whole=True, at_least=1, at_most=_LARGEST)
    if trainer.resume_from_path is not None and trainer.resume_mode != "resume_path":
        raise ConfigError(
            "trainer.resume_from_path",
            f"{trainer.resume_from_path} has no effect with trainer.resume_mode={trainer.resume_mode}. Set "
            "trainer.resume_mode=resume_path, or leave it out.",
        )
    require_number(f"{ACTOR}.optim.lr", config.actor_rollout_ref.actor.optim.lr, above=0)
    _check_run_directory(Path(str(trainer.default_local_dir)).expanduser())
    require_choice("trainer.device", trainer.device, DEVICES, kind="device")
    strategy = config.actor_rollout_ref.actor.strategy
    require_choice("actor_rollout_ref.actor.strategy", strategy, STRATEGIES, kind="strategy")
    return int(trainer.n_gpus_per_node * trainer.nnodes)


def _check_run_directory(path: Path) -> None:
    """The run directory, or the place where it is to be made, must be a directory that can be written to."""
    if problem := why_not_writable(path):
        raise ConfigError("trainer.default_local_dir", f"{path}: {problem}. Name another place.")


def why_not_writable(path: Path) -> str | None:
    """What is wrong with `path`, or the place where it is to be made; None if it can be written to."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK):
        return None
    return f"{place} {'cannot be written to' if place.is_dir() else 'is no directory'}"


def _check_batches(config: DictConfig, refine: RefineSettings, workers: int) -> None:
    """The batch falls into mini-batches, a mini-batch into workers, a worker's share into micro-batches."""
    _check_mini_batch(config, refine, workers, "refine.ppo_mini_batch_size", refine.ppo_mini_batch_size)
    if refine.outer_mini_batch_size is not None:
        _check_mini_batch(config, refine, workers, "refine.outer_mini_batch_size", refine.outer_mini_batch_size)
    _check_gradient_signal(config, refine, workers)
    batch, at_most = config.data.train_batch_size, config.data.train_max_samples
    if refine.phase != "ttt" and 0 < at_most < batch:
        raise ConfigError(
            "data.train_max_samples",
            f"{at_most} sequences do not fill a batch of data.train_batch_size={batch}. Raise it or lower the batch.",
        )


def _check_gradient_signal(config: DictConfig, refine: RefineSettings, workers: int) -> None:
    """Two halves of a worker's share of a mini-batch are compared, and some step has to be the one."""
    every, mini, steps = refine.gradient_snr_every, refine.ppo_mini_batch_size, config.trainer.total_training_steps
    if every and mini // workers < 2:
        raise ConfigError(
            "refine.gradient_snr_every",
            f"{every} compares two halves of each worker's share of a mini-batch, which is {mini // workers} document "
            f"(refine.ppo_mini_batch_size={mini} over {workers} workers). Set refine.ppo_mini_batch_size to "
            f"{2 * workers} or more, or refine.gradient_snr_every=0.",
        )
    if steps is not None and every > steps:
        raise ConfigError(
            "refine.gradient_snr_every",
            f"{every} is more than trainer.total_training_steps={steps}, so that nothing would be measured. Lower it.",
        )
    if steps is not None and every and steps // every * every <= refine.warmup_steps < steps:
        raise ConfigError(
            "refine.gradient_snr_every",
            f"{every}: none of the steps {refine.warmup_steps + 1} to {steps}, which have rollouts "
            f"(refine.warmup_steps, trainer.total_training_steps), is a multiple of it, so that nothing would be "
            "measured. Lower it.",
        )


def _check_mini_batch(config: DictConfig, refine: RefineSettings, workers: int, key: str, mini: int) -> None:
    batch = config.data.train_batch_size
    if mini > batch:
        raise ConfigError(
            key,
            f"{mini} is more than data.train_batch_size={batch}. Lower it to {batch} or raise data.train_batch_size.",
        )
    if batch % mini:
        raise ConfigError(
            key,
            f"{mini} does not divide data.train_batch_size={batch}.{_near_divisors(batch, mini)}",
        )
    # test-time training has few prompts to a mini-batch: workers that are left over get one without weight
    if mini % workers and refine.phase != "ttt":
        raise ConfigError(
            key,
            f"{mini} cannot be shared equally by {workers} workers (trainer.n_gpus_per_node="
            f"{config.trainer.n_gpus_per_node} x trainer.nnodes={config.trainer.nnodes}). Make it, and "
            f"data.train_batch_size={batch}, a multiple of {workers}, or change the number of workers.",
        )
    share = -(-mini // workers)
    micro = config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
    if share % micro:
        raise ConfigError(
            f"{ACTOR}.ppo_micro_batch_size_per_gpu",
            f"{micro} does not divide a worker's share of a mini-batch, {share} ({key}={mini} "
            f"over {workers} workers).{_near_divisors(share, micro)}",
        )
    mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    if mode in RANKING_LOSSES and micro < mini and (refine.uses_rollouts or refine.outer == "grpo"):
        raise ConfigError(
            f"{ACTOR}.policy_loss.loss_mode",
            f"{mode} ranks the tokens of a mini-batch ({key}={mini}) and would see those of a micro-batch only. Set "
            f"{ACTOR}.ppo_micro_batch_size_per_gpu={mini} with one worker, or take another loss.",
        )


def _near_divisors(number: int, wanted: int) -> str:
    divisors = [value for value in range(1, number + 1) if number % value == 0]
    lower = max((value for value in divisors if value < wanted), default=None)
    upper = min((value for value in divisors if value > wanted), default=None)
    near = " or ".join(str(value) for value in (lower, upper) if value is not None)
    return f" {near} would." if near else ""


def _make_paths_absolute(config: DictConfig) -> None:
    """Workers do not share the driver's working directory."""
    trainer = config.trainer
    trainer.default_local_dir = str(Path(str(trainer.default_local_dir)).expanduser().absolute())
    for key in ("path", "tokenizer"):
        value = config.model[key]
        if isinstance(value, str) and Path(value).expanduser().is_dir():
            config.model[key] = str(Path(value).expanduser().absolute())
    config.actor_rollout_ref.model.path = config.model.path
    for section, key in ((config.refine.ttt, "keep"), (config.actor_rollout_ref.model, "lora_adapter_path")):
        if section[key] is not None:
            section[key] = str(Path(str(section[key])).expanduser().absolute())
    function = config.reward.custom_reward_function
    if function.path is not None and Path(function.path).expanduser().is_file():
        function.path = str(Path(function.path).expanduser().absolute())
