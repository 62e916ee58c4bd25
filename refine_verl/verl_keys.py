"""verl's keys whose wrong values only a worker would notice: optimiser, schedule, checkpoints, dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from refine_verl.compose import automatic_dtype
from refine_verl.config import ConfigError, did_you_mean, require_choice

SCHEDULES = ("constant", "cosine")
CHECKPOINT_CONTENTS = ("model", "optimizer", "extra", "hf_model")
_FLOAT32 = ("fp32", "float32", "32")
_BFLOAT16 = ("bf16", "bfloat16")
_PRECISIONS = (*_FLOAT32, *_BFLOAT16, "fp16", "float16", "16")

_ACTOR = "actor_rollout_ref.actor"
_OPTIM = f"{_ACTOR}.optim"
_FSDP = f"{_ACTOR}.fsdp_config"


def check_verl_keys(config: DictConfig) -> None:
    """Hold verl's keys to what its FSDP engine takes, before a worker does; loads neither torch nor verl.

    Args:
        config: resolved.

    Raises:
        ConfigError: key, value, what is allowed and the cure.
    """
    actor = config.actor_rollout_ref.actor
    _check_schedule(actor.optim)
    _require_number(f"{_OPTIM}.clip_grad", actor.optim.clip_grad, above=0)
    _require_number(f"{_ACTOR}.clip_ratio_c", actor.clip_ratio_c, above=1)
    for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high"):
        if actor[name] is not None:
            _require_number(f"{_ACTOR}.{name}", actor[name], at_least=0)
    for name in ("save_contents", "load_contents"):
        _check_contents(f"{_ACTOR}.checkpoint.{name}", actor.checkpoint[name])
    _check_dtypes(actor.fsdp_config, config.trainer.device)
    workers, size = config.trainer.n_gpus_per_node * config.trainer.nnodes, actor.fsdp_config.fsdp_size
    if isinstance(size, bool) or not isinstance(size, int) or size == 0 or (0 < size < workers and workers % size):
        raise ConfigError(
            f"{_FSDP}.fsdp_size", f"must be -1 (all workers) or divide the {workers} workers, got {size}."
        )


def _check_schedule(optim: DictConfig) -> None:
    require_choice(f"{_OPTIM}.lr_scheduler_type", optim.lr_scheduler_type, SCHEDULES, kind="schedule")
    if optim.warmup_style is not None:
        require_choice(f"{_OPTIM}.warmup_style", optim.warmup_style, SCHEDULES, kind="schedule")
    _require_number(f"{_OPTIM}.lr_warmup_steps_ratio", optim.lr_warmup_steps_ratio, at_least=0, at_most=1)
    if optim.min_lr_ratio is not None:
        _require_number(f"{_OPTIM}.min_lr_ratio", optim.min_lr_ratio, at_least=0, at_most=1)
    if len(optim.betas) != 2:
        raise ConfigError(f"{_OPTIM}.betas", f"takes two numbers, such as [0.9,0.999], got {list(optim.betas)}.")
    steps = optim.lr_warmup_steps
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ConfigError(f"{_OPTIM}.lr_warmup_steps", f"must be an integer (-1: by the ratio), got {steps!r}.")


def _check_contents(key: str, contents: Any) -> None:
    words = [contents] if isinstance(contents, str) else contents
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


def _require_number(
    key: str, value: Any, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(key, f"must be a number, got {value!r}.")
    if above is not None and value <= above:
        raise ConfigError(key, f"must be greater than {above:g}, got {value}.")
    if at_least is not None and value < at_least:
        raise ConfigError(key, f"must be at least {at_least:g}, got {value}.")
    if at_most is not None and value > at_most:
        raise ConfigError(key, f"must be at most {at_most:g}, got {value}.")


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
