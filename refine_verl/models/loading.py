"""From a directory or hub id to a model REFINE can train, refusing early what it cannot."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fla.models  # noqa: F401  registers fla's model types with transformers
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import refine_verl.models.lact  # noqa: F401  registers LaCT
from refine_verl.config import ModelError, did_you_mean
from refine_verl.config.hub import local_files_only, why_not
from refine_verl.kernels import ensure_kernels
from refine_verl.models.adapters import FLA_VERIFIED_ON_CPU, FlaAdapter, get_adapter, known_model_types
from refine_verl.models.weights import check_configuration, describe_problems, misfit

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read.

    Attributes:
        model_type: the family, e.g. ``delta_net``.
        vocab_size: number of tokens the LM head predicts.
        has_weights: False for a directory that holds a configuration only (random weights).
        config: the Hugging Face configuration.
    """

    model_type: str
    vocab_size: int
    has_weights: bool
    config: PretrainedConfig


def inspect_model(path: str | Path | None, config: dict[str, Any] | None = None) -> ModelInfo:
    """Check that a model can be trained here, from its configuration alone.

    Args:
        path: a local directory or a hub id; None if only ``config`` is given.
        config: a model configuration with a ``model_type``, or values that override those at ``path``.

    Raises:
        ModelError: no such directory, no readable config.json, not a fast-weight model, or one whose kernels only
            run on a GPU while there is none.
    """
    overrides = dict(config or {})
    loaded = _config_from_values(overrides) if path is None else _config_from_path(str(path), overrides)
    check_family(loaded, "model.config" if path is None else str(path), on_gpu=torch.cuda.is_available())
    if not loaded.architectures:  # a configuration made from values; verl and transformers export by this name
        loaded.architectures = [AutoModelForCausalLM._model_mapping[type(loaded)].__name__]
    has_weights = path is not None and (
        not Path(path).is_dir() or any(any(Path(path).glob(name)) for name in _WEIGHT_FILES)
    )
    return ModelInfo(loaded.model_type, loaded.vocab_size, has_weights, loaded)


def load_model(
    path: str | Path | None,
    *,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """Read a causal language model, or make one with random weights where there are none.

    Args:
        path: directory or hub id; None or a directory without weights gives random weights.
        config: used instead of the one at ``path``.
        dtype: of all parameters.
        seed: of the random weights.

    Raises:
        ModelError: the checkpoint lacks keys of the model or has keys the model lacks.
    """
    ensure_kernels()
    info = None if path is None and config is not None else inspect_model(path)
    if info is not None:
        config = config or info.config
        if info.has_weights:
            check_configuration(str(path), config)
            # weights of another shape come back in the report, as a name with both shapes, not as an exception
            model, report = AutoModelForCausalLM.from_pretrained(
                str(path), config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
            if problems := describe_problems(report):
                raise misfit(str(path), config, problems)
            return model.to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    logger.warning("model: random weights (seed %d), no checkpoint was given", seed)
    return model.to(dtype)


def _config_from_values(values: dict[str, Any]) -> PretrainedConfig:
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ModelError("model: give model.path=DIR_OR_HUB_ID, or a preset such as model=tiny_deltanet")
    if model_type not in known_model_types():
        raise _not_fast_weight(str(model_type), "model.config")
    config = AutoConfig.for_model(model_type)
    for key in values:
        if not hasattr(config, key):
            known = [name for name in vars(config) if not name.startswith("_")]
            raise ModelError(f"model.config.{key}: a {model_type} has no such setting.{did_you_mean(key, known)}")
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ModelError(f"model.config: {error}") from error


def _config_from_path(name: str, overrides: dict[str, Any]) -> PretrainedConfig:
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if looks_local and not path.is_dir():
        raise ModelError(f"model.path={name}: no such directory")
    if looks_local and not (path / "config.json").is_file():
        raise ModelError(f"model.path={name}: no config.json in this directory; is it a Hugging Face model directory?")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=local_files_only(name), **overrides)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not looks_local and isinstance(error, OSError):
            raise ModelError(
                f"model.path={name}: there is no such directory, and as a hub id it cannot be read: {why_not(name)}. "
                "Without access to the hub, download the model elsewhere and give its directory."
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model.path={name}: its configuration cannot be read ({reason}).") from error


def check_family(config: PretrainedConfig, where: str, on_gpu: bool) -> None:
    """Check that a model is one whose state can be forked.

    Args:
        config: of the model.
        where: what the message begins with.
        on_gpu: whether it will run on a GPU.

    Raises:
        ModelError: no fast-weight model, one with softmax attention, or one whose kernels need a GPU.
    """
    if config.model_type not in known_model_types():
        raise _not_fast_weight(config.model_type, where)
    if getattr(config, "attn", None):
        raise ModelError(
            f"{where}: this {config.model_type} mixes in softmax attention layers (config.attn). Their cache grows "
            "with the text, so it is no fast-weight state to fork; only purely recurrent models are supported."
        )
    on_gpu_only = (
        isinstance(get_adapter(config.model_type), FlaAdapter) and config.model_type not in FLA_VERIFIED_ON_CPU
    )
    if on_gpu_only and not on_gpu:
        raise ModelError(
            f"{where}: the kernels of {config.model_type} need a GPU, and it would run on the CPU here. "
            f"These run without a GPU: {', '.join(FLA_VERIFIED_ON_CPU)}."
        )


def _not_fast_weight(model_type: str, where: str) -> ModelError:
    return ModelError(
        f"{where}: '{model_type}' is not a fast-weight model REFINE knows. Supported model types: "
        f"{', '.join(known_model_types())}. For your own model, register an adapter (docs/extending.md)."
    )
