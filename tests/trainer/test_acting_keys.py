"""Every key of verl that is said to act changes what reads it: an optimiser, a loss, an engine, a loader, ..."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from reference.configurations import Composer
from reference.evaluate_files import PROMPT_RUN, make_model, write_prompts
from tensordict import TensorDict
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tracking import Tracking
from verl.workers.config.optimizer import build_optimizer

from refine_verl.compose.acting_keys import ACTING, SERVER_KEYS
from refine_verl.compose.composition import compose_config
from refine_verl.compose.validate import validate
from refine_verl.compose.verl_keys import STRATEGIES
from refine_verl.config import ConfigError
from refine_verl.preflight.checkpoints import checkpoint_to_resume
from refine_verl.preflight.run import prepare_run
from refine_verl.trainer.posttrain import PosttrainTrainer
from refine_verl.workers.advantage import answer_advantages
from refine_verl.workers.engine import RefineEngine
from refine_verl.workers.loss import RefineLoss
from refine_verl.workers.objective import Objective

ACTOR = "actor_rollout_ref.actor"
OPTIM, FSDP, POLICY = f"{ACTOR}.optim", f"{ACTOR}.fsdp_config", f"{ACTOR}.policy_loss"
ALL_TOGETHER = f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"
COSINE = (f"{OPTIM}.lr_scheduler_type=cosine",)

TESTED_IN: dict[str, str] = {
    "trainer.max_restarts": "trainer/test_attempts.py",
    "trainer.max_actor_ckpt_to_keep": "trainer/test_faults.py",
    "trainer.val_only": "trainer/test_trainer.py",
    "ray_kwargs.ray_init": "trainer/test_launch.py",
    "trainer.nnodes": "cluster/test_capacity.py",
    "actor_rollout_ref.model.external_lib": "docs/test_new_model.py",
    **dict.fromkeys(
        (f"actor_rollout_ref.model.{name}" for name in ("lora_rank", "lora_alpha", "exclude_modules")),
        "reference/adapter_ranks.py",
    ),
    **dict.fromkeys(
        (f"actor_rollout_ref.model.{name}" for name in ("target_modules", "lora_adapter_path")),
        "export/test_export.py",
    ),
    "reward.custom_reward_function": "trainer/test_reward_function.py",
    **dict.fromkeys(SERVER_KEYS, "trainer/test_servers.py"),
}
"""Keys that need more than a look at one object, and where they are seen to act."""
ONE_VALUE = {
    f"{ACTOR}.strategy": "fsdp",
    f"{FSDP}.model_dtype": "bf16",
    f"{FSDP}.mixed_precision.param_dtype": "bf16",
    f"{FSDP}.dtype": "bfloat16",
    "trainer.device": "npu",
}
"""Keys that have one value where there is no GPU, and another one that is refused."""


class Noted(CheckpointCallback):
    """A callback of a user."""


class AdamW(torch.optim.AdamW):
    """An optimiser of a user."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("acting")
    make_model(root / "model")
    write_prompts(root)
    return root


@functools.cache
def composer(root: Path) -> Composer:
    return Composer([base_of(root)])


@functools.cache
def run_of(root: Path, *overrides: str) -> DictConfig:
    """What a trainer would get."""
    keys = {item.partition("=")[0] for item in overrides}
    kept = [item for item in base_of(root) if item.partition("=")[0] not in keys]
    return prepare_run(validate(composer(root)([*kept, *overrides]))).launch_config()


def base_of(root: Path) -> list[str]:
    return [
        "recipe=posttrain",
        "refine.inner=none",
        "refine.outer=grpo",
        f"model.path={root / 'model'}",
        f"data.train_files={root / 'prompts.jsonl'}",
        f"data.val_files={root / 'prompts.jsonl'}",
        f"data.cache_dir={root / 'cache'}",
        f"trainer.default_local_dir={root / 'run'}",
        *PROMPT_RUN,
        "trainer.device=cpu",
    ]


def optimiser(config: DictConfig) -> object:
    """The optimiser that verl builds, and the learning rate over 8 steps."""
    optim = omega_conf_to_dataclass(config.actor_rollout_ref.actor.optim)
    built = build_optimizer([torch.nn.Parameter(torch.ones(2, 2))], optim)
    schedule = dataclasses.replace(optim, total_training_steps=8)
    engine = RefineEngine.__new__(RefineEngine)
    engine.optimizer_config, engine.rank = schedule, 1
    scheduler = engine._build_lr_scheduler(built)
    rates = []
    for _ in range(8):
        rates.append(built.param_groups[0]["lr"])
        built.step()
        scheduler.step()
    return type(built).__module__, type(built).__name__, built.defaults, rates, optim.clip_grad


def policy_loss(config: DictConfig) -> object:
    """The loss of the same answers, some of them far from the policy that wrote them."""
    draws = torch.Generator().manual_seed(0)
    new, old = torch.randn(12, 8, generator=draws) - 2, torch.randn(12, 8, generator=draws) - 2
    advantages = torch.randn(12, 8, generator=draws)
    mask = torch.arange(8) < torch.randint(2, 9, (12, 1), generator=draws)
    data = TensorDict({"weight": torch.ones(4)}, batch_size=4)
    tu.assign_non_tensor(data, objective=Objective.ANSWERS, batch_num_tokens=int(mask.sum()))
    loss = RefineLoss(PosttrainTrainer(config).settings.loss, omega_conf_to_dataclass(config.actor_rollout_ref.actor))
    torch.manual_seed(0)
    return loss._policy_loss(new, old, advantages, mask, global_rollouts=12, data=data)[0].item()


def advantages(config: DictConfig) -> object:
    lengths = torch.tensor([[2, 3, 4], [4, 1, 2]])
    return answer_advantages(torch.tensor([[0.0, 1.0, 0.3], [1.0, 0.0, 0.0]]), lengths, 4, config.algorithm).tolist()


def worker(config: DictConfig) -> object:
    """What the workers are made of."""
    trainer = PosttrainTrainer(config)
    trainer._init_tokenizer()
    made = trainer._worker_config()
    model = made.model_config
    return (
        dataclasses.asdict(made.engine_config),
        dataclasses.asdict(made.checkpoint_config),
        repr(made.profiler_config),
        made.extra_context["worker"],
        model.hf_config._attn_implementation,
        model.use_shm,
    )


def loader(config: DictConfig) -> object:
    """The batches of the first epochs, and how they are loaded."""
    trainer = PosttrainTrainer(config)
    trainer._init_tokenizer()
    trainer._init_dataloader()
    order = (
        [batch["id"].tolist() for batch in trainer.train_dataloader] if not trainer.train_dataloader.num_workers else 0
    )
    return (
        order,
        trainer.train_dataloader.num_workers,
        len(trainer.val_dataset),
        trainer.val_dataloader.batch_size,
        trainer.total_training_steps,
    )


def driver(config: DictConfig) -> object:
    """What the driver decides from its keys."""
    trainer = PosttrainTrainer(config)
    trainer.global_steps, trainer.total_training_steps = 2, 9
    trainer.val_dataset, recorded = [1], []
    trainer._validate = lambda: {}
    due = trainer._is_due(config.trainer.save_freq), trainer._is_due(config.trainer.test_freq)
    trainer.global_steps = 0
    trainer._before_the_first_step(recorded.append)
    trainer._start_profile_schedule()
    sent: list[object] = []
    trainer.actor_rollout_wg = SimpleNamespace(start_profile=lambda **given: sent.append(given))
    trainer._start_rollout_profiling = lambda: None
    trainer.use_reference_policy = trainer.use_critic = False
    trainer.prev_step_profile = True
    trainer._start_profiling()
    callback = type(trainer.checkpoint_callback).__name__
    return due, recorded, trainer.curr_step_profile, sent, str(trainer.run_dir), callback


def updates(config: DictConfig) -> object:
    """What an update message says."""
    trainer = PosttrainTrainer(config)
    trainer.global_steps, sent = 1, []
    metrics = {"grad_norm": [1.0], "lr": [0.1], "perf/max_memory_allocated_gb": [0.0], "forward_tokens": [1.0]}

    def update(data: TensorDict) -> Any:
        sent.append(tu.get(data, "epochs"))
        answer = tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics})
        return SimpleNamespace(get=lambda: answer)

    trainer.actor_rollout_wg = SimpleNamespace(world_size=1, update=update)
    batch = TensorDict({"tokens": torch.zeros(4, 2)}, batch_size=4)
    trainer._update(batch, Objective.DOCUMENTS, {})
    return sent


def resumed(config: DictConfig) -> object:
    try:
        return checkpoint_to_resume(config)
    except ConfigError as error:
        return str(error)


def tracked(config: DictConfig) -> object:
    trainer = config.trainer
    return trainer.default_local_dir, sorted(Tracking("p", "e", default_backend=list(trainer.logger), config={}).logger)


Reader = Callable[[DictConfig], object]
CASES: list[tuple[Reader, str, tuple[str, ...]]] = [
    (optimiser, f"{OPTIM}.lr=0.5", ()),
    (optimiser, f"{OPTIM}.optimizer=SGD", ()),
    (optimiser, f"{OPTIM}.optimizer_impl={__name__}", ()),
    (optimiser, f"{OPTIM}.override_optimizer_config={{eps: 0.5}}", ()),
    (optimiser, f"{OPTIM}.weight_decay=0.5", ()),
    (optimiser, f"{OPTIM}.betas=[0.5,0.6]", ()),
    (optimiser, f"{OPTIM}.clip_grad=0.5", ()),
    (optimiser, f"{OPTIM}.lr_scheduler_type=cosine", ()),
    (optimiser, f"{OPTIM}.warmup_style=cosine", ()),
    (optimiser, f"{OPTIM}.lr_warmup_steps=3", ()),
    (optimiser, f"{OPTIM}.lr_warmup_steps_ratio=0.5", ()),
    (optimiser, f"{OPTIM}.min_lr_ratio=0.5", COSINE),
    (optimiser, f"{OPTIM}.num_cycles=2.0", COSINE),
    (optimiser, f"{OPTIM}.zero_indexed_step=false", COSINE),
    (policy_loss, f"{ACTOR}.clip_ratio_low=0.05", ()),
    (policy_loss, f"{ACTOR}.clip_ratio_high=0.05", ()),
    (policy_loss, f"{ACTOR}.clip_ratio=0.05", (f"{ACTOR}.clip_ratio_low=null", f"{ACTOR}.clip_ratio_high=null")),
    (policy_loss, f"{ACTOR}.clip_ratio_c=1.5", ()),
    (policy_loss, f"{ACTOR}.tau_pos=2.0", (f"{POLICY}.loss_mode=sapo",)),
    (policy_loss, f"{ACTOR}.tau_neg=2.0", (f"{POLICY}.loss_mode=sapo",)),
    (policy_loss, f"{POLICY}.loss_mode=gpg", ()),
    (
        policy_loss,
        f"{POLICY}.clip_cov_ratio=0.5",
        (f"{POLICY}.loss_mode=clip_cov", ALL_TOGETHER, f"{POLICY}.clip_cov_lb=0.0"),
    ),
    (
        policy_loss,
        f"{POLICY}.clip_cov_lb=0.0",
        (f"{POLICY}.loss_mode=clip_cov", ALL_TOGETHER, f"{POLICY}.clip_cov_ratio=0.5"),
    ),
    (
        policy_loss,
        f"{POLICY}.clip_cov_ub=0.1",
        (f"{POLICY}.loss_mode=clip_cov", ALL_TOGETHER, f"{POLICY}.clip_cov_ratio=0.5", f"{POLICY}.clip_cov_lb=0.0"),
    ),
    (
        policy_loss,
        f"{POLICY}.kl_cov_ratio=0.5",
        (
            f"{POLICY}.loss_mode=kl_cov",
            ALL_TOGETHER,
        ),
    ),
    (
        policy_loss,
        f"{POLICY}.ppo_kl_coef=5.0",
        (f"{POLICY}.loss_mode=kl_cov", ALL_TOGETHER, f"{POLICY}.kl_cov_ratio=0.5"),
    ),
    (policy_loss, f"{POLICY}.dro_beta=0.5", (f"{POLICY}.loss_mode=dro", f"{POLICY}.dro_beta=1.5")),
    (policy_loss, f"{ACTOR}.loss_agg_mode=token-mean", ()),
    (policy_loss, f"{ACTOR}.loss_scale_factor=3", (f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm",)),
    (advantages, "algorithm.adv_estimator=rloo", ()),
    (advantages, "algorithm.norm_adv_by_std_in_grpo=false", ()),
    (updates, f"{ACTOR}.ppo_epochs=3", ()),
    (worker, f"{ACTOR}.ppo_micro_batch_size_per_gpu=2", ()),
    (worker, "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2", ()),
    (worker, f"{FSDP}.fsdp_size=1", ()),
    *(
        (worker, f"{FSDP}.{name}={value}", ())
        for name, value in {
            "param_offload": "true",
            "optimizer_offload": "true",
            "offload_policy": "true",
            "reshard_after_forward": "false",
            "forward_prefetch": "true",
            "use_no_sync_for_gradient_accumulation": "true",
            "full_determinism": "true",
            "mixed_precision.reduce_dtype": "bf16",
        }.items()
    ),
    (worker, f"{FSDP}.seed=7", (f"{FSDP}.full_determinism=true",)),
    (worker, f"{ACTOR}.checkpoint.save_contents=[model]", ()),
    (worker, f"{ACTOR}.checkpoint.load_contents=[model]", ()),
    (worker, f"{ACTOR}.profiler.enable=true", ()),
    (worker, "actor_rollout_ref.model.override_config.attn_implementation=sdpa", ()),
    (worker, "actor_rollout_ref.model.use_shm=true", ()),
    (worker, "global_profiler.tool=torch", ()),
    (worker, "global_profiler.save_path=elsewhere", ()),
    (worker, "global_profiler.relocate_results=true", ()),
    (worker, "global_profiler.finish_hook_cmd=ls", ()),
    (worker, "global_profiler.finish_hook_all_ranks=true", ()),
    (worker, "global_profiler.finish_hook_ranks=[0]", ()),
    (worker, "global_profiler.global_tool_config.nsys.discrete=true", ()),
    (worker, "global_profiler.global_tool_config.torch_memory.stack_depth=7", ()),
    (worker, "global_profiler.global_tool_config.precision_debugger.strict=true", ()),
    (driver, "global_profiler.steps=[1]", ()),
    (driver, "global_profiler.profile_continuous_steps=true", ("global_profiler.steps=[1]",)),
    (driver, "trainer.save_freq=2", ()),
    (driver, "trainer.test_freq=2", ()),
    (driver, "trainer.val_before_train=false", ()),
    (driver, f"trainer.checkpoint_callback_class={__name__}.Noted", ()),
    (tracked, "trainer.default_local_dir=elsewhere", ()),
    (tracked, "trainer.logger=[]", ()),
    (worker, "data.seed=7", ()),
    (loader, "data.shuffle=false", ()),
    (loader, "data.train_batch_size=2", ("refine.ppo_mini_batch_size=2",)),
    (loader, "data.val_batch_size=3", ()),
    (loader, "data.train_max_samples=4", ()),
    (loader, "data.val_max_samples=4", ()),
    (loader, "data.dataloader_num_workers=1", ()),
    (loader, "trainer.total_epochs=3", ()),
    (loader, "trainer.total_training_steps=17", ()),
    (resumed, "trainer.resume_mode=resume_path", ("trainer.resume_from_path=/no/global_step_1",)),
    (
        resumed,
        "trainer.resume_from_path=/no/global_step_2",
        ("trainer.resume_mode=resume_path", "trainer.resume_from_path=/no/global_step_1"),
    ),
]
NAMED = ("trainer.project_name", "trainer.experiment_name", "trainer.n_gpus_per_node")
"""Seen without a trainer."""


@pytest.mark.parametrize(("reader", "override", "context"), CASES, ids=[case[1] for case in CASES])
def test_a_key_acts(
    reader: Reader,
    override: str,
    context: tuple[str, ...],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    key = override.partition("=")[0]
    without = [item for item in context if item.partition("=")[0] != key]
    if key == "trainer.resume_mode":
        before, after = run_of_checked(files), run_of_checked(files, *context, override)
    elif key == "trainer.resume_from_path":
        before, after = run_of_checked(files, *context), run_of_checked(files, *without, override)
    else:
        before, after = run_of(files, *context), run_of(files, *without, override)
    assert reader(before) != reader(after)
    assert reader(before) == reader(before)


def run_of_checked(root: Path, *overrides: str) -> DictConfig:
    """Only validated: there is no such checkpoint."""
    base = ["recipe=posttrain", "model=tiny_deltanet", "data.train_files=FILE", "trainer.n_gpus_per_node=1"]
    return validate(compose_config([*base, f"trainer.default_local_dir={root / 'run'}", *overrides])).config


def test_names_and_workers_act(files: Path) -> None:
    base = ["recipe=posttrain", "model=tiny_deltanet", "data.train_files=FILE"]
    for key in NAMED[:2]:
        one, other = (validate(compose_config([*base, f"{key}={value}"])).config for value in ("one", "other"))
        assert one.trainer.default_local_dir != other.trainer.default_local_dir
    assert validate(compose_config([*base, "trainer.n_gpus_per_node=2"])).workers == 2


@pytest.mark.parametrize(("key", "value"), ONE_VALUE.items())
def test_keys_with_one_value(key: str, value: str) -> None:
    base = ["recipe=posttrain", "model=tiny_deltanet", "data.train_files=FILE", "trainer.device=cpu"]
    with pytest.raises(ConfigError) as caught:
        validate(compose_config([*[item for item in base if not item.startswith(f"{key}=")], f"{key}={value}"]))
    assert caught.value.key == key


def test_every_key_that_acts_is_seen_to_act() -> None:
    seen = {case[1].partition("=")[0] for case in CASES}
    shown = {key for key in ACTING if any(name == key or name.startswith(f"{key}.") for name in seen)}
    assert shown | set(TESTED_IN) | set(ONE_VALUE) | set(NAMED) == set(ACTING)
    for key, place in TESTED_IN.items():
        assert key.rpartition(".")[2] in (Path(__file__).parents[1] / place).read_text(), key


def test_the_losses_of_the_table_are_verls() -> None:
    assert {"sapo", "gpg", "clip_cov", "kl_cov", "dro"} <= set(core_algos.POLICY_LOSS_REGISTRY)
    assert STRATEGIES == ("fsdp2",)
