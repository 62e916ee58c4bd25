"""The doors into verl listed in `refine_verl/plugin.py` still have the shape we use them in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from verl.plugin.platform.platform_base import PlatformBase
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.debug import marked_timer
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.fsdp_utils import get_fsdp_full_state_dict, get_init_weight_context_manager
from verl.utils.metric import Metric
from verl.utils.model import get_generation_config
from verl.utils.tracking import Tracking
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
from verl.workers.engine_workers import TrainingWorker

from refine_verl.plugin import CpuPlatform
from refine_verl.trainer.posttrain import PosttrainTrainer
from refine_verl.trainer.prompts import PromptTrainer
from refine_verl.trainer.refine_trainer import RefineTrainer
from refine_verl.trainer.saving import CheckpointingTrainer
from refine_verl.trainer.ttt import TTTTrainer
from refine_verl.workers.engine import RefineEngine
from refine_verl.workers.worker import NSPRolloutWorker

OVERRIDDEN: dict[str, tuple[type, type, set[str]]] = {
    "trainer": (
        RefineTrainer,
        PPOTrainer,
        {
            "_build_replay_buffer",
            "_setup",
            "on_step_end",
            "on_sample_end",
            "fit",
            "step",
            "_validate",
        },
    ),
    "checkpoints": (CheckpointingTrainer, PPOTrainer, {"__init__", "_save_checkpoint", "_load_checkpoint"}),
    "engine": (
        RefineEngine,
        FSDPEngine,
        {
            "_build_module",
            "_build_lora_module",
            "_build_lr_scheduler",
            "forward_backward_batch",
            "forward_step",
            "lr_scheduler_step",
            "load_checkpoint",
            "get_per_tensor_param",
        },
    ),
    "posttrain": (PosttrainTrainer, PPOTrainer, {"__init__", "_setup", "step", "_validate"}),
    "prompts": (PromptTrainer, PPOTrainer, {"fit"}),
    "ttt": (TTTTrainer, PPOTrainer, {"step"}),
    "worker": (NSPRolloutWorker, TrainingWorker, {"__init__", "save_checkpoint"}),
    "platform": (
        CpuPlatform,
        PlatformBase,
        {*PlatformBase.__abstractmethods__, "is_platform_available", "ray_resource_options"},
    ),
}
OURS_ALONE = {"__init__", "fit"}
"""Overridden with parameters of our own: nobody but us calls them."""


@pytest.mark.parametrize("door", OVERRIDDEN)
def test_what_we_override_is_still_there(door: str) -> None:
    ours, base, names = OVERRIDDEN[door]
    for name in names:
        assert callable(getattr(base, name, None)) or isinstance(getattr(base, name), property), name
        assert name in vars(ours), f"{ours.__name__}.{name} is gone: take it off this list"


@pytest.mark.parametrize("door", OVERRIDDEN)
def test_we_accept_what_verl_passes(door: str) -> None:
    ours, base, names = OVERRIDDEN[door]
    for name in names - OURS_ALONE:
        if isinstance(getattr(base, name), property):
            continue
        mine = inspect.signature(getattr(ours, name)).parameters.values()
        anything = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in mine)
        named = {parameter.name for parameter in mine}
        theirs = [p for p in inspect.signature(getattr(base, name)).parameters.values() if p.kind is not p.VAR_KEYWORD]
        missing = {parameter.name for parameter in theirs} - named
        assert anything or not missing, f"{name}: verl passes {missing}"


@pytest.mark.parametrize("door", OVERRIDDEN)
def test_we_override_nothing_else_of_verls(door: str) -> None:
    """A method of ours whose name a new verl takes would change what verl does."""
    ours, base, names = OVERRIDDEN[door]
    shared = {
        name
        for name, value in vars(ours).items()
        if hasattr(base, name) and callable(value) and not (name.startswith("__") and name.endswith("__"))
    }
    assert shared <= names | {"__init__"}


CALLED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "init tokenizer": (PPOTrainer._init_tokenizer, (None,), {}),
    "init dataloader": (PPOTrainer._init_dataloader, (None,), {}),
    "init dump executor": (PPOTrainer._init_dump_executor, (None,), {}),
    "shut it down": (PPOTrainer._shutdown_dump_executor, (None,), {}),
    "load checkpoint": (PPOTrainer._load_checkpoint, (None,), {}),
    "save checkpoint": (FSDPEngine.save_checkpoint, (None, "", None, 0, None), {}),
    "note a checkpoint": (
        CheckpointCallback.on_save,
        (None,),
        {"trainer": None, "global_step": 0, "checkpoint_dir": "", "async_save": False},
    ),
    "profiling": (PPOTrainer._start_profiling, (None,), {}),
    "end of profiling": (PPOTrainer._stop_profiling, (None,), {}),
    "random state": (BaseCheckpointManager.get_rng_state, (), {}),
    "random state back": (BaseCheckpointManager.load_rng_state, (None,), {}),
    "generation config": (get_generation_config, (None,), {}),
    "hooks": (PPOTrainer.on_train_begin, (None,), {}),
    "more hooks": (PPOTrainer.on_train_end, (None,), {}),
    "step hook": (PPOTrainer.on_step_begin, (None,), {}),
    "pool": (RayResourcePool, ([1],), {"use_gpu": True, "max_colocate_count": 1, "name_prefix": "workers"}),
    "worker class": (RayClassWithInitArgs, (), {"cls": None, "config": None}),
    "worker group": (
        RayWorkerGroup,
        (),
        {"resource_pool": None, "ray_cls_with_init": None, "device_name": "cpu"},
    ),
    "worker config": (
        TrainingWorkerConfig,
        (),
        dict.fromkeys(
            (
                "model_type",
                "model_config",
                "engine_config",
                "optimizer_config",
                "checkpoint_config",
                "profiler_config",
                "extra_context",
            )
        ),
    ),
    "mini-batches": (TrainingWorker.train_mini_batch, (None, None), {}),
    "worker checkpoint": (
        TrainingWorker.save_checkpoint,
        (None, "local", "remote", 1),
        {"max_ckpt_to_keep": None},
    ),
    "set loss": (TrainingWorker.set_loss_fn, (None, None), {}),
    "reset": (TrainingWorker.reset, (None,), {}),
    "eval mode": (FSDPEngine.eval_mode, (None,), {}),
    "ranks": (FSDPEngine.get_data_parallel_size, (None,), {}),
    "group": (FSDPEngine.get_data_parallel_group, (None,), {}),
    "engines": (EngineRegistry.register, (), {"model_type": "m", "backend": ["fsdp"], "device": ["cpu"]}),
    "process group": (initialize_global_process_group_ray, (), {"backend": "gloo"}),
    "weights on rank 0": (get_init_weight_context_manager, (), {"use_meta_tensor": True, "mesh": None}),
    "full weights": (get_fsdp_full_state_dict, (None,), {"offload_to_cpu": True, "rank0_only": True}),
    "estimators": (core_algos.get_adv_estimator_fn, ("grpo",), {}),
    "policy losses": (core_algos.get_policy_loss_fn, ("vanilla",), {}),
    "vanilla loss": (
        core_algos.get_policy_loss_fn("vanilla"),
        (),
        dict.fromkeys(
            (
                "old_log_prob",
                "log_prob",
                "advantages",
                "response_mask",
                "loss_agg_mode",
                "config",
                "rollout_is_weights",
            )
        ),
    ),
    "metric": (Metric, ("sum", 1.0), {}),
    "dataclasses": (omega_conf_to_dataclass, (None,), {}),
    "validation": (validate_config, (None,), {"use_reference_policy": False, "use_critic": False}),
    "timer": (marked_timer, ("step", {}), {}),
    "tracking": (
        Tracking,
        (),
        {"project_name": "p", "experiment_name": "e", "default_backend": [], "config": {}},
    ),
    "tracking log": (Tracking.log, (None,), {"data": {}, "step": 1}),
    "Ray environment": (get_ppo_ray_runtime_env, (None,), {}),
    "tensordict": (tu.get_tensordict, (), {"tensor_dict": {}, "non_tensor_dict": {}}),
    "non-tensors": (tu.assign_non_tensor, (None,), {"anything": 1}),
    "non-tensor": (tu.get_non_tensor_data, (None, "key", 0), {}),
    "select": (tu.index_select_tensor_dict, (None, []), {}),
    "get": (tu.get, (None, "metrics"), {}),
}


@pytest.mark.parametrize("door", CALLED)
def test_what_we_call_takes_what_we_pass(door: str) -> None:
    function, arguments, named = CALLED[door]
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        pytest.fail(f"{function.__qualname__}: {error}")


def test_the_check_notices_a_change() -> None:
    """Negative control."""
    with pytest.raises(TypeError):
        inspect.signature(get_fsdp_full_state_dict).bind(None, offload=True)


def test_the_version_is_the_one_we_pin() -> None:
    from importlib.metadata import version

    assert version("verl") == "0.9.1"
