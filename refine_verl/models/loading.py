"""From a directory or hub id to a model REFINE can train, refusing early what it cannot.

`open_model` is the door that every command puts a model through before it does anything else.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import fla.models  # noqa: F401  registers fla's model types with transformers
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from refine_verl.config import ConfigError, ModelError, did_you_mean
from refine_verl.config.hub import LFS_POINTER, is_lfs_pointer, local_files_only, why_not
from refine_verl.config.refusals import with_article
from refine_verl.kernels import ensure_kernels
from refine_verl.models.adapters import (
    FLA_NOT_SUPPORTED,
    FLA_THROUGH_THE_SAME_ADAPTER,
    FLA_VERIFIED_ON_CPU,
    has_attention_layers,
    known_model_types,
)
from refine_verl.models.hybrid import MIXERS
from refine_verl.models.hybrid.checks import HYBRIDS_NOT_SUPPORTED, attention_not_supported, why_not_supported
from refine_verl.models.lact import LaCTConfig
from refine_verl.models.weights import (
    Unusable,
    check_numbers,
    check_weights,
    describe_problems,
    misfit,
    naming,
    read_headers,
)

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def open_model(path: str | Path | None, config: dict[str, Any] | None = None, *, key: str = "model.path") -> ModelInfo:
    """Everything that can be told of a model before its weights are read; takes no memory.

    Args:
        path: a local directory or a hub id; None for random weights of ``config``.
        config: see `inspect_model`.
        key: what named the model, for messages.

    Raises:
        ModelError: see `inspect_model`; a configuration of which no model can be made; weights that are not there, are
            damaged, or do not fit.
    """
    info = inspect_model(path, config, key=key)
    with naming("model.config" if path is None else f"{key}={path}"):
        _check_architecture(info)
    if path is not None:
        check_weights(path, info.config, key=key)
    return info


def inspect_model(
    path: str | Path | None, config: dict[str, Any] | None = None, *, key: str = "model.path"
) -> ModelInfo:
    """Check that a model can be trained here, from its configuration alone.

    Args:
        path: a local directory or a hub id; None if only ``config`` is given.
        config: a model configuration with a ``model_type``, or values that override those at ``path``.
        key: what named the model, for messages.

    Raises:
        ModelError: no such directory, no readable config.json, not a fast-weight model, or one whose kernels only
            run on a GPU while there is none.
    """
    overrides = dict(config or {})
    with naming("model.config" if path is None else f"{key}={path}"):
        loaded = _config_from_values(overrides) if path is None else _config_from_path(str(path), overrides)
        check_family(loaded, on_gpu=torch.cuda.is_available())
        _check_attention(loaded)
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
    key: str = "model.path",
) -> nn.Module:
    """Read a causal language model, or make one with random weights where there are none.

    Args:
        path: directory or hub id; None or a directory without weights gives random weights.
        config: used instead of the one at ``path``.
        dtype: of all parameters.
        seed: of the random weights.
        key: what named the model, for messages.

    Raises:
        ModelError: damaged weights, a checkpoint that lacks keys of the model or has keys the model lacks, weights
            that are no numbers.
    """
    ensure_kernels()
    info = None if path is None and config is not None else inspect_model(path, key=key)
    if info is not None:
        config = config or info.config
        if info.has_weights:
            with naming(f"{key}={path}"):
                return _read(str(path), config, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    logger.warning("model: random weights (seed %d), no checkpoint was given", seed)
    return model.to(dtype)


def _read(path: str, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    read_headers(path, config)
    try:
        # weights of another shape come back in the report, as a name with both shapes, not as an exception
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (SafetensorError, UnpicklingError, EOFError, OSError) as error:
        raise Unusable(f"its weights cannot be read ({error}). Download or copy them again.") from error
    if problems := describe_problems(report):
        raise misfit(config, problems)
    model = model.to(dtype)
    check_numbers(model)
    return model


def _config_from_values(values: dict[str, Any]) -> PretrainedConfig:
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ModelError("model: give model.path=DIR_OR_HUB_ID, or a preset such as model=tiny_deltanet")
    if model_type not in known_model_types():
        raise _not_fast_weight(str(model_type))
    config = AutoConfig.for_model(model_type)
    for key in values:
        if not hasattr(config, key):
            known = [name for name in vars(config) if not name.startswith("_")]
            raise ModelError(
                f"model.config.{key}: {with_article(model_type)} has no such setting.{did_you_mean(key, known)}"
            )
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # configurations check their values with exceptions of many types
        raise Unusable(" ".join(str(error).split())) from error


def _config_from_path(name: str, overrides: dict[str, Any]) -> PretrainedConfig:
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if looks_local and not path.is_dir():
        raise Unusable("no such directory")
    if looks_local and not (path / "config.json").is_file():
        raise Unusable("no config.json in this directory; is it a Hugging Face model directory?")
    if is_lfs_pointer(path / "config.json"):
        raise Unusable(f"config.json {LFS_POINTER}")
    only_here = local_files_only(name)
    try:
        values, _ = PretrainedConfig.get_config_dict(name, local_files_only=only_here)
        model_type = values.get("model_type")
        if isinstance(model_type, str) and model_type not in known_model_types():
            raise _not_fast_weight(model_type)  # its own class might only complain of its values
        return AutoConfig.from_pretrained(name, local_files_only=only_here, **overrides)
    except Unusable:
        raise
    except Exception as error:  # configurations check their values with exceptions of many types
        if not looks_local and isinstance(error, OSError):
            raise Unusable(
                f"there is no such directory, and as a hub id it cannot be read: {why_not(name)}. Without access to "
                "the hub, download the model elsewhere and give its directory."
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unusable(f"its configuration cannot be read ({reason}).") from error


def _check_architecture(info: ModelInfo) -> None:
    """Build the model without memory: sizes that do not fit together come out here and not in a worker."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(info.config)
    except Exception as error:  # model classes check their configuration with assert and raise as they like
        raise Unusable(f"no {info.model_type} can be made of this configuration: {error or repr(error)}") from error


def check_family(config: PretrainedConfig, on_gpu: bool) -> None:
    """Check that a model is one whose state can be forked and whose weights can be trained.

    Args:
        config: of the model.
        on_gpu: whether it will run on a GPU.

    Raises:
        Unusable: no fast-weight model, one with quantised weights or a state that grows, or one whose kernels need a
            GPU.
    """
    kind = config.model_type
    if kind not in known_model_types():
        raise _not_fast_weight(kind)
    if quantised := getattr(config, "quantization_config", None):
        method = (
            quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        )
        raise Unusable(
            f"its weights are quantised (quantization_config of config.json: {getattr(method, 'value', method)}), and "
            "they are trained, and their states forked, in floating point. Give the model it was made of."
        )
    if has_attention_layers(config) and (reason := attention_not_supported(config)):
        raise Unusable(reason)
    if kind in MIXERS and (reason := why_not_supported(config)):
        raise Unusable(reason)
    if isinstance(config, LaCTConfig) and config.window_size is None:
        raise Unusable(
            f"the attention of this {kind} sees all tokens before (window_size=null). Its keys and values grow with "
            "the text, so they are no fast-weight state to fork. Give it a window: window_size=2048 is the published "
            "one."
        )
    if kind in FLA_THROUGH_THE_SAME_ADAPTER and not on_gpu:
        raise Unusable(
            f"the kernels of {kind} need a GPU, and it would run on the CPU here. These run without a GPU: "
            f"{', '.join(FLA_VERIFIED_ON_CPU)}."
        )


def _check_attention(config: PretrainedConfig) -> None:
    """Refuse what transformers would, in words that help; models of a user's may have any."""
    wanted = getattr(config, "_attn_implementation", None)
    ours = (*MIXERS, *FLA_VERIFIED_ON_CPU, *FLA_THROUGH_THE_SAME_ADAPTER)
    if config.model_type in ours and wanted not in (None, "eager", "sdpa"):
        raise Unusable(
            f"attn_implementation={wanted} of config.json: the passes here have an attention of their own, and for the "
            "model's own forward function eager and sdpa can be had. Remove it from config.json, or set one of them."
        )


def _not_fast_weight(model_type: str) -> Unusable:
    if reason := FLA_NOT_SUPPORTED.get(model_type):
        return Unusable(
            f"'{model_type}' of flash-linear-attention is not supported: {reason}. Supported model types: "
            f"{', '.join(known_model_types())}."
        )
    if reason := HYBRIDS_NOT_SUPPORTED.get(model_type):
        return Unusable(
            f"'{model_type}' is not supported: {reason}. Supported model types: {', '.join(known_model_types())}."
        )
    return Unusable(
        f"'{model_type}' is not a fast-weight model REFINE knows. Supported model types: "
        f"{', '.join(known_model_types())}. For your own model, register an adapter (docs/extending.md)."
    )


def device_of(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda[:N]` means here.

    Raises:
        ConfigError: an unknown one, or a GPU where there is none.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError("device", f"unknown device {name!r}. Allowed: auto, cpu, cuda, cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", f"{name!r} was asked for, but there is no GPU here. Set device=cpu.")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("device", f"{name!r} is not supported. Allowed: auto, cpu, cuda, cuda:N.")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `auto` (bfloat16 on a GPU, else float32), `float32` or `bfloat16` means there."""
    return DTYPES[name] if name != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32


def import_external(package: str, key: str = "external_lib") -> None:
    """Import a user's package, which registers a model and its adapter.

    Args:
        package: its name.
        key: what names it.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        importlib.import_module(package)
    except Exception as error:  # a user's package may fail in any way while it is imported
        raise ConfigError(
            key,
            f"{package} cannot be imported ({type(error).__name__}: {error}). Install it, or put its directory on "
            "PYTHONPATH.",
        ) from error
