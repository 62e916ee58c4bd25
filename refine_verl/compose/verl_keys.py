"""verl's keys: those that have one value here, and those whose wrong values only a worker would notice."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.composition import automatic_dtype
from refine_verl.config import ConfigError, did_you_mean, require_choice

STRATEGIES = ("fsdp2",)
SCHEDULES = ("constant", "cosine")
LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
CHECKPOINT_CONTENTS = ("model", "optimizer", "extra", "hf_model")
_FLOAT32 = ("fp32", "float32", "32")
_BFLOAT16 = ("bf16", "bfloat16")
_PRECISIONS = (*_FLOAT32, *_BFLOAT16, "fp16", "float16", "16")

ACTOR = "actor_rollout_ref.actor"
_OPTIM = f"{ACTOR}.optim"
_FSDP = f"{ACTOR}.fsdp_config"
_SERVER = "actor_rollout_ref.rollout"
_OVERRIDES = "actor_rollout_ref.model.override_config"


FOLLOWERS = {
    "actor_rollout_ref.model.path": "model.path",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "refine.ppo_mini_batch_size",
    "actor_rollout_ref.rollout.n": "refine.nsp.rollouts_per_position",
    "actor_rollout_ref.actor.grad_clip": "actor_rollout_ref.actor.optim.clip_grad",
    "actor_rollout_ref.rollout.temperature": "refine.nsp.temperature",
}
"""verl's keys that take their value from a short key; setting them apart would be a contradiction."""

_ONE_PATH = "rollouts come from the training workers, in one way only"
_NO_REFERENCE = "REFINE has no reference model"
ONE_BY_ONE = (
    "answers are scored one by one, as by verl's naive manager; what another one adds goes into a function of yours, "
    "reward.custom_reward_function.path=FILE"
)
FIXED: dict[str, tuple[Any, str]] = {
    "trainer.use_v1": (True, "REFINE's trainer is a v1 trainer"),
    "trainer.v1.trainer_mode": ("sync", _ONE_PATH),
    "transfer_queue.enable": (False, _ONE_PATH),
    "distillation.enabled": (False, "there is no teacher"),
    "data.gen_batch_size": (None, "a step reads data.train_batch_size documents"),
    "algorithm.filter_groups.enable": (False, "no group is drawn again"),
    "trainer.v1.sampler.sync_refill_failed_groups": (False, "no group is drawn again"),
    "algorithm.rollout_correction.bypass_mode": (False, "rollouts and updates have the same weights and kernels"),
    "trainer.default_hdfs_dir": (None, "checkpoints stay where they are written"),
    "trainer.rollout_data_dir": (None, "rollouts are not written to files; python -m refine_verl.inspect shows them"),
    "trainer.validation_data_dir": (None, "answers are in predictions.jsonl of the run directory"),
    "trainer.log_val_generations": (0, "answers are in predictions.jsonl of the run directory"),
    "critic.enable": (False, "advantages are relative to the group, without a critic"),
    "algorithm.use_kl_in_reward": (False, _NO_REFERENCE),
    "actor_rollout_ref.actor.use_kl_loss": (False, _NO_REFERENCE),
    "actor_rollout_ref.actor.entropy_coeff": (0, "REFINE's loss has no entropy term"),
    "actor_rollout_ref.actor.use_dynamic_bsz": (
        False,
        "micro-batches are counted in documents: set actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    ),
    "actor_rollout_ref.actor.ppo_micro_batch_size": (
        None,
        "set actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu instead",
    ),
    "actor_rollout_ref.actor.shuffle": (False, "mini-batches keep the order of data.shuffle"),
    "actor_rollout_ref.model.use_liger": (False, "its kernels are for other models"),
    "actor_rollout_ref.actor.checkpoint.async_save": (False, "verl's FSDP engine saves while training waits"),
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": (1, "a document stays on one worker"),
    "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": (
        1,
        "a document stays on one worker",
    ),
    "actor_rollout_ref.model.enable_gradient_checkpointing": (
        False,
        "it drops the carried state; set model.activation_checkpointing=layer instead",
    ),
    "actor_rollout_ref.model.use_remove_padding": (False, "REFINE packs documents itself"),
    "actor_rollout_ref.model.lora.rank": (
        0,
        "it is of verl's Megatron engine. Set actor_rollout_ref.model.lora_rank",
    ),
    "reward.reward_manager.name": ("naive", ONE_BY_ONE),
    "actor_rollout_ref.rollout.top_k": (-1, "rollouts are drawn from the whole distribution"),
    "actor_rollout_ref.rollout.top_p": (1, "rollouts are drawn from the whole distribution"),
}
"""verl's options that REFINE cannot honour: the only value each may have, and why."""

UNSUPPORTED_LOSSES = ("bypass_mode", "geo_mean")
"""Policy losses of verl that cannot be used: ``geo_mean`` is a mean over the micro-batch, so it would weigh the more
the smaller micro-batches are; ``bypass_mode`` needs what a rollout server sends."""

RANKING_LOSSES = ("clip_cov", "kl_cov")
"""Policy losses of verl that choose tokens by their rank among those they are given: those of a micro-batch."""


def check_verl_keys(config: DictConfig) -> None:
    """Hold verl's keys to what its FSDP engine takes, before a worker does; loads neither torch nor verl.

    Args:
        config: resolved.

    Raises:
        ConfigError: key, value, what is allowed and the cure.
    """
    actor = config.actor_rollout_ref.actor
    _check_schedule(actor.optim)
    require_number(f"{_OPTIM}.clip_grad", actor.optim.clip_grad, above=0)
    require_number(f"{ACTOR}.clip_ratio_c", actor.clip_ratio_c, above=1)
    require_choice(f"{ACTOR}.loss_agg_mode", actor.loss_agg_mode, LOSS_AGG_MODES)
    for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high"):
        if actor[name] is not None:
            require_number(f"{ACTOR}.{name}", actor[name], at_least=0)
    server = config.actor_rollout_ref.rollout
    require_number(f"{_SERVER}.gpu_memory_utilization", server.gpu_memory_utilization, above=0, at_most=1)
    if server.max_model_len is not None:
        require_number(f"{_SERVER}.max_model_len", server.max_model_len, whole=True, at_least=2)
    for name in ("save_contents", "load_contents"):
        _check_contents(f"{ACTOR}.checkpoint.{name}", actor.checkpoint[name])
    _check_dtypes(actor.fsdp_config, config.trainer.device)
    workers, size = config.trainer.n_gpus_per_node * config.trainer.nnodes, actor.fsdp_config.fsdp_size
    if isinstance(size, bool) or not isinstance(size, int) or size == 0 or (0 < size < workers and workers % size):
        raise ConfigError(
            f"{_FSDP}.fsdp_size", f"must be -1 (all workers) or divide the {workers} workers, got {size}."
        )


ATTENTION = ("eager", "sdpa")
"""Implementations of attention that can be had everywhere; the passes of a run have one of their own."""


def check_fixed(config: DictConfig) -> None:
    """Refuse contradictions between keys, and values that would have no effect or the wrong one.

    Raises:
        ConfigError: see `FOLLOWERS` and `FIXED`.
    """
    for follower, leader in FOLLOWERS.items():
        value, led = OmegaConf.select(config, follower), OmegaConf.select(config, leader)
        if value != led:
            raise ConfigError(follower, f"{value} contradicts {leader}={led}, which it follows. Set {leader} instead.")
    for name in OmegaConf.select(config, _OVERRIDES) or {}:
        if name != "attn_implementation":
            raise ConfigError(
                f"{_OVERRIDES}.{name}",
                "would change the model in the workers behind the back of all checks. Change config.json of the model, "
                "or set model.config for random weights.",
            )
    require_choice(
        f"{_OVERRIDES}.attn_implementation",
        config.actor_rollout_ref.model.override_config.attn_implementation,
        ATTENTION,
        kind="implementation",
    )
    for key, (allowed, reason) in FIXED.items():
        value = OmegaConf.select(config, key)
        if value != allowed:
            shown = str(allowed).lower() if isinstance(allowed, bool) else "null" if allowed is None else allowed
            raise ConfigError(key, f"{value} is not supported: {reason}. The only value is {shown}.")


def _check_schedule(optim: DictConfig) -> None:
    require_choice(f"{_OPTIM}.lr_scheduler_type", optim.lr_scheduler_type, SCHEDULES, kind="schedule")
    if optim.warmup_style is not None:
        require_choice(f"{_OPTIM}.warmup_style", optim.warmup_style, SCHEDULES, kind="schedule")
    require_number(f"{_OPTIM}.lr_warmup_steps_ratio", optim.lr_warmup_steps_ratio, at_least=0, at_most=1)
    if optim.min_lr_ratio is not None:
        require_number(f"{_OPTIM}.min_lr_ratio", optim.min_lr_ratio, at_least=0, at_most=1)
    if not OmegaConf.is_list(optim.betas) or len(optim.betas) != 2:
        raise ConfigError(f"{_OPTIM}.betas", f"takes two numbers, such as [0.9,0.999], got {optim.betas}.")
    for beta in optim.betas:
        require_number(f"{_OPTIM}.betas", beta, at_least=0, below=1)
    require_number(f"{_OPTIM}.weight_decay", optim.weight_decay, at_least=0)
    require_number(f"{_OPTIM}.lr_warmup_steps", optim.lr_warmup_steps, whole=True, at_least=-1)


def _check_contents(key: str, contents: Any) -> None:
    words = [contents] if isinstance(contents, str) else contents
    if words is not None and not OmegaConf.is_list(words) and not isinstance(words, list):
        raise ConfigError(key, f"takes a list, got {contents!r}.")
    if not words:
        raise ConfigError(key, f"is empty. Name some of {', '.join(CHECKPOINT_CONTENTS)}.")
    for word in words:
        require_choice(key, word, CHECKPOINT_CONTENTS, kind="content")
    if isinstance(contents, str):
        raise ConfigError(key, f"takes a list: write {key}=[{contents}].")


def _check_dtypes(fsdp: DictConfig, device: str) -> None:
    kept = "parameters, states and gradients are kept in float32"
    _require_dtype(f"{_FSDP}.model_dtype", fsdp.model_dtype, _FLOAT32, kept)
    products = _BFLOAT16 if device == "cuda" else _FLOAT32
    if fsdp.dtype != automatic_dtype():  # of this host; the driver of a cluster may have no GPU
        _require_dtype(f"{_FSDP}.dtype", fsdp.dtype, products, f"on {device} matrix products run in {products[-1]}")
    precision = fsdp.mixed_precision
    if not OmegaConf.is_dict(precision):
        raise ConfigError(f"{_FSDP}.mixed_precision", f"null means bfloat16 parameters to verl, but {kept}.")
    _require_dtype(f"{_FSDP}.mixed_precision.param_dtype", precision.param_dtype, _FLOAT32, kept)
    for name in ("reduce_dtype", "buffer_dtype"):
        key = f"{_FSDP}.mixed_precision.{name}"
        require_choice(key, str(precision[name]), _PRECISIONS, kind="dtype")


def _require_dtype(key: str, value: object, allowed: tuple[str, ...], reason: str) -> None:
    if str(value) not in allowed:
        raise ConfigError(key, f"{value!r} cannot be used: {reason}. The only value is {allowed[0]}.")


def require_number(
    key: str,
    value: Any,
    *,
    whole: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse what is not a finite (or whole) number within these bounds.

    Raises:
        ConfigError: with the key, the value and the bound.
    """
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise ConfigError(key, f"must be {'an integer' if whole else 'a number'}, got {value!r}.")
    if above is not None and value <= above:
        raise ConfigError(key, f"must be greater than {above:g}, got {value}.")
    if at_least is not None and value < at_least:
        raise ConfigError(key, f"must be at least {at_least:g}, got {value}.")
    if below is not None and value >= below:
        raise ConfigError(key, f"must be less than {below:g}, got {value}.")
    if at_most is not None and value > at_most:
        raise ConfigError(key, f"must be at most {at_most}, got {value}.")


def check_optimizer(optim: DictConfig) -> None:
    """Build the optimiser as verl's engine will, on parameters of one, two and three dimensions. Imports verl.

    Args:
        optim: the section `actor_rollout_ref.actor.optim`, resolved.

    Raises:
        ConfigError: no such module or class, or one that does not take these arguments or parameters.
    """
    import importlib

    import torch
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.optimizer import build_optimizer

    module, name = optim.optimizer_impl, optim.optimizer
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # an optional package may fail in any way while it is imported
        raise ConfigError(
            f"{_OPTIM}.optimizer_impl",
            f"{module!r} cannot be imported ({type(error).__name__}: {error}). Install it, or take torch.optim.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        classes = _optimizers(vars(importlib.import_module(module)).values())
        raise ConfigError(
            f"{_OPTIM}.optimizer",
            f"{module} has no optimiser {name!r}. Allowed: {', '.join(classes)}.{did_you_mean(name, classes)}",
        )
    parameters = [torch.nn.Parameter(torch.zeros((2,) * dimensions)) for dimensions in (1, 2, 3)]
    try:
        build_optimizer(parameters, omega_conf_to_dataclass(optim))
    except Exception as error:  # optimisers raise TypeError, ValueError, RuntimeError and AssertionError alike
        given = f" with {_OPTIM}.override_optimizer_config" if optim.override_optimizer_config else ""
        raise ConfigError(
            f"{_OPTIM}.optimizer",
            f"{name!r} cannot be used{given}: {error}. It is made for all parameters (vectors, matrices, "
            "convolutions), with lr and weight_decay, and betas where its name has adam in it.",
        ) from error


def _optimizers(found: Iterable[object]) -> list[str]:
    import torch

    base = torch.optim.Optimizer
    return sorted(
        {item.__name__ for item in found if isinstance(item, type) and issubclass(item, base)} - {"Optimizer"}
    )
