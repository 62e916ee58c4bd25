"""The keys of verl that act here, and what is said of the others: a value that would change nothing is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.composition import base_schema
from refine_verl.compose.schema import leaves
from refine_verl.compose.verl_keys import FIXED, FOLLOWERS, ONE_BY_ONE
from refine_verl.config import ConfigError, DataSettings, PromptSettings, list_settings

_OPTIM = "actor_rollout_ref.actor.optim"
_FSDP = "actor_rollout_ref.actor.fsdp_config"
_POLICY = "actor_rollout_ref.actor.policy_loss"
_SERVER = "actor_rollout_ref.rollout"
LORA = "actor_rollout_ref.model"

ACTING: dict[str, str] = {
    "data.train_batch_size": "sequences per step, over all workers",
    "data.val_batch_size": "sequences per validation message to the workers",
    "data.train_max_samples": "so many sequences are trained on at most; -1: all",
    "data.val_max_samples": "so many sequences are validated on at most; -1: all",
    "data.seed": "of the order of documents, of all sampling and of random weights",
    "data.shuffle": "documents in random order",
    "data.dataloader_num_workers": "processes that load prepared documents",
    f"{_OPTIM}.lr": "learning rate",
    f"{_OPTIM}.optimizer": "class of the optimiser",
    f"{_OPTIM}.optimizer_impl": "module of the optimiser's class",
    f"{_OPTIM}.override_optimizer_config": "more arguments of the optimiser's class",
    f"{_OPTIM}.weight_decay": "of the optimiser",
    f"{_OPTIM}.betas": "of Adam and its kin",
    f"{_OPTIM}.clip_grad": "clip of the gradient's norm",
    f"{_OPTIM}.lr_scheduler_type": "schedule of the learning rate: constant or cosine",
    f"{_OPTIM}.warmup_style": "verl's old name of lr_scheduler_type",
    f"{_OPTIM}.lr_warmup_steps": "steps of warm-up; -1: by lr_warmup_steps_ratio",
    f"{_OPTIM}.lr_warmup_steps_ratio": "share of all steps that is warm-up",
    f"{_OPTIM}.min_lr_ratio": "where the cosine ends, as a share of lr",
    f"{_OPTIM}.num_cycles": "cycles of the cosine",
    f"{_OPTIM}.zero_indexed_step": "the schedule counts steps from 0",
    "actor_rollout_ref.actor.clip_ratio": "PPO clip ratio of sides without one of their own",
    "actor_rollout_ref.actor.clip_ratio_low": "PPO clip ratio below 1",
    "actor_rollout_ref.actor.clip_ratio_high": "PPO clip ratio above 1",
    "actor_rollout_ref.actor.clip_ratio_c": "bound of the dual clip",
    "actor_rollout_ref.actor.tau_pos": "of the policy loss sapo",
    "actor_rollout_ref.actor.tau_neg": "of the policy loss sapo",
    f"{_POLICY}.loss_mode": "a policy loss of verl's registry",
    f"{_POLICY}.clip_cov_ratio": "of the policy loss clip_cov",
    f"{_POLICY}.clip_cov_lb": "of the policy loss clip_cov",
    f"{_POLICY}.clip_cov_ub": "of the policy loss clip_cov",
    f"{_POLICY}.kl_cov_ratio": "of the policy loss kl_cov",
    f"{_POLICY}.ppo_kl_coef": "of the policy loss kl_cov",
    f"{_POLICY}.dro_beta": "of the policy loss dro",
    "actor_rollout_ref.actor.loss_agg_mode": "how the tokens of rollouts or answers are averaged",
    "actor_rollout_ref.actor.loss_scale_factor": "of loss_agg_mode=seq-mean-token-sum-norm",
    "actor_rollout_ref.actor.ppo_epochs": "passes over a batch of rollouts",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "documents per forward and backward pass and worker",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": "documents per pass and worker without gradients",
    f"{_SERVER}.tensor_model_parallel_size": "devices that a vLLM server has",
    f"{_SERVER}.gpu_memory_utilization": "share of the memory that a vLLM server takes",
    f"{_SERVER}.free_cache_engine": "vLLM servers give their memory back between uses; on CPUs they do not",
    f"{_SERVER}.max_model_len": "tokens of a prompt with its answer that a vLLM server takes",
    f"{_SERVER}.max_num_seqs": "answers that a vLLM server writes at a time",
    f"{_SERVER}.max_num_batched_tokens": "tokens that a vLLM server reads at a time",
    f"{_SERVER}.enable_prefix_caching": "a vLLM server keeps what prompts begin with",
    f"{_SERVER}.enable_chunked_prefill": "a vLLM server reads long prompts in pieces",
    f"{_SERVER}.enforce_eager": "vLLM servers without torch.compile and CUDA graphs",
    f"{_SERVER}.cudagraph_capture_sizes": "batch sizes for which vLLM servers record CUDA graphs",
    f"{_SERVER}.checkpoint_engine.update_weights_bucket_megabytes": "MB of weights sent to a vLLM server at a time",
    f"{_SERVER}.engine_kwargs.vllm": "more arguments of `vllm serve`",
    "actor_rollout_ref.actor.strategy": "how parameters are sharded; one of `fsdp2`",
    f"{_FSDP}.fsdp_size": "workers that share one copy of the parameters; -1: all",
    f"{_FSDP}.param_offload": "keep parameters on the CPU between uses",
    f"{_FSDP}.optimizer_offload": "keep the optimiser's state on the CPU between uses",
    f"{_FSDP}.offload_policy": "FSDP2's own offload to the CPU",
    f"{_FSDP}.reshard_after_forward": "free the gathered parameters of a layer after its forward pass",
    f"{_FSDP}.forward_prefetch": "gather the next layer's parameters during a forward pass",
    f"{_FSDP}.use_no_sync_for_gradient_accumulation": "exchange gradients with the last micro-batch only",
    f"{_FSDP}.full_determinism": "deterministic kernels only",
    f"{_FSDP}.seed": "of full_determinism",
    f"{_FSDP}.dtype": "of matrix products",
    f"{_FSDP}.model_dtype": "of parameters: float32",
    f"{_FSDP}.mixed_precision.param_dtype": "of parameters: float32",
    f"{_FSDP}.mixed_precision.reduce_dtype": "in which gradients are added up over workers",
    "actor_rollout_ref.actor.checkpoint.save_contents": "what a checkpoint holds",
    "actor_rollout_ref.actor.checkpoint.load_contents": "what is taken from a checkpoint",
    "actor_rollout_ref.actor.profiler": "verl's profiler of the workers",
    f"{LORA}.lora_rank": "rank of LoRA adapters, which alone are trained; 0: all weights are",
    f"{LORA}.lora_alpha": "adapters count lora_alpha / lora_rank",
    f"{LORA}.target_modules": "linear layers that get an adapter: all-linear, a list of names, or a pattern",
    f"{LORA}.exclude_modules": "linear layers that get none: a list of names, or a pattern",
    f"{LORA}.lora_adapter_path": "a PEFT adapter to go on from",
    "actor_rollout_ref.model.external_lib": "a package that registers a model and its adapter",
    "actor_rollout_ref.model.override_config.attn_implementation": "of a hybrid's own forward function",
    "actor_rollout_ref.model.use_shm": "workers read the model from a copy in shared memory",
    "reward.custom_reward_function": "a function of yours that scores answers",
    "algorithm.adv_estimator": "an advantage estimator of verl's registry, without critic",
    "algorithm.norm_adv_by_std_in_grpo": "divide by the group's standard deviation",
    "global_profiler.tool": "which profiler",
    "global_profiler.steps": "which steps are profiled",
    "global_profiler.profile_continuous_steps": "one profile for steps that follow each other",
    "global_profiler.save_path": "where profiles are written",
    "global_profiler.relocate_results": "move them there in the end",
    "global_profiler.finish_hook_cmd": "a command for each profile",
    "global_profiler.finish_hook_all_ranks": "on all workers",
    "global_profiler.finish_hook_ranks": "on these workers",
    "global_profiler.global_tool_config.nsys.discrete": "of the profiler nsys",
    "global_profiler.global_tool_config.torch_memory": "of the profiler torch_memory",
    "global_profiler.global_tool_config.precision_debugger": "of the profiler precision_debugger",
    "trainer.project_name": "what loggers and run directories are named by",
    "trainer.experiment_name": "what loggers and run directories are named by",
    "trainer.default_local_dir": "the run directory",
    "trainer.logger": "any of verl's",
    "trainer.device": "cuda or cpu",
    "trainer.nnodes": "groups of that many workers",
    "trainer.n_gpus_per_node": "workers per node",
    "trainer.total_epochs": "times the data",
    "trainer.total_training_steps": "steps",
    "trainer.save_freq": "a checkpoint every so many steps",
    "trainer.test_freq": "a validation every so many steps",
    "trainer.val_before_train": "validate before the first step",
    "trainer.val_only": "validate and stop",
    "trainer.resume_mode": "from which checkpoint a run resumes",
    "trainer.resume_from_path": "the checkpoint of trainer.resume_mode=resume_path",
    "trainer.max_restarts": "how often a run that lost a worker resumes by itself",
    "trainer.max_actor_ckpt_to_keep": "checkpoints that stay",
    "trainer.checkpoint_callback_class": "a class of yours that is told of each checkpoint",
    "ray_kwargs.ray_init": "arguments of ray.init",
}
"""verl's keys and sections that act, and what they do; `docs/recipes.md` says more."""

SERVER_KEYS = (
    *(key for key in ACTING if key.startswith(f"{_SERVER}.") and not key.endswith("log_prob_micro_batch_size_per_gpu")),
)
"""Those of vLLM servers, `refine.answers.engine=vllm`."""

_COSINE = ((f"{_OPTIM}.lr_scheduler_type", "cosine"), (f"{_OPTIM}.warmup_style", "cosine"))
ONLY_WITH: dict[str, tuple[tuple[str, object], ...]] = {
    **dict.fromkeys(
        (f"{_OPTIM}.{name}" for name in ("min_lr_ratio", "num_cycles", "zero_indexed_step")),
        _COSINE,
    ),
    **dict.fromkeys(
        (f"actor_rollout_ref.actor.{name}" for name in ("tau_pos", "tau_neg")), ((f"{_POLICY}.loss_mode", "sapo"),)
    ),
    **dict.fromkeys(
        (f"{_POLICY}.{name}" for name in ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub")),
        ((f"{_POLICY}.loss_mode", "clip_cov"),),
    ),
    **dict.fromkeys(
        (f"{_POLICY}.{name}" for name in ("kl_cov_ratio", "ppo_kl_coef")), ((f"{_POLICY}.loss_mode", "kl_cov"),)
    ),
    f"{_POLICY}.dro_beta": ((f"{_POLICY}.loss_mode", "dro"),),
    "actor_rollout_ref.actor.loss_scale_factor": (
        ("actor_rollout_ref.actor.loss_agg_mode", "seq-mean-token-sum-norm"),
    ),
    f"{_FSDP}.seed": ((f"{_FSDP}.full_determinism", True),),
    **dict.fromkeys(SERVER_KEYS, (("refine.answers.engine", "vllm"),)),
}
"""Keys and sections that act with one of these choices of another key only."""
ONLY_WITH_ADAPTERS = tuple(
    f"{LORA}.{name}" for name in ("lora_alpha", "target_modules", "exclude_modules", "lora_adapter_path")
)
VERLS_LOSSES = (
    *("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"),
    "bypass_mode",
)
"""What these read is known; a policy loss of a user's may read any key."""

_ANSWERS = "answers that are sampled have refine.answers.samples, refine.answers.temperature and data.max_new_tokens"
_NO_REFERENCE = "REFINE has no reference model"
_NO_CRITIC = "advantages are relative to the group, without a critic"
_NO_REWARD_MODEL = (
    "answers are scored by the metric of their task. For a score of your own, set "
    "reward.custom_reward_function.path=FILE"
)
INSTEAD: dict[str, str] = {
    "custom_reward_function": "set reward.custom_reward_function.path and reward.custom_reward_function.name",
    "reward_model": _NO_REWARD_MODEL,
    "reward": _NO_REWARD_MODEL,
    "reward.reward_manager": ONE_BY_ONE,
    "reward_model.reward_manager": ONE_BY_ONE,
    "sandbox_fusion": _NO_REWARD_MODEL,
    "critic": _NO_CRITIC,
    "trainer.critic_warmup": _NO_CRITIC,
    "algorithm.lam": _NO_CRITIC,
    "algorithm.gamma": (
        "an answer has one reward, with one advantage for all of its tokens, and what tokens of a rollout earn is not "
        "discounted"
    ),
    "actor_rollout_ref.ref": _NO_REFERENCE,
    "actor_rollout_ref.actor.kl_loss_coef": _NO_REFERENCE,
    "actor_rollout_ref.actor.kl_loss_type": _NO_REFERENCE,
    "algorithm.kl_ctrl": _NO_REFERENCE,
    "algorithm.kl_penalty": _NO_REFERENCE,
    "actor_rollout_ref.rollout": f"rollouts come from the training workers and have refine.nsp.*; {_ANSWERS}",
    "actor_rollout_ref.rollout.val_kwargs": "validation takes one greedy answer to each prompt",
    "actor_rollout_ref.rollout.seed": "set data.seed",
    "actor_rollout_ref.rollout.response_length": "set data.max_new_tokens, or refine.nsp.rollout_length for rollouts",
    "actor_rollout_ref.rollout.prompt_length": "set data.max_prompt_length",
    "data.max_response_length": "set data.max_new_tokens, or refine.nsp.rollout_length for rollouts",
    "data.tokenizer": "set model.tokenizer",
    "actor_rollout_ref.model.tokenizer_path": "set model.tokenizer",
    "data.truncation": "set data.overlong_prompts, or data.long_documents for documents",
    "data.filter_overlong_prompts": "set data.overlong_prompts",
    "data.return_raw_chat": "set data.chat_template",
    "data.reward_fn_key": "set data.task_key: the task chooses the metric",
    "data.trust_remote_code": "set actor_rollout_ref.model.external_lib for code of a model",
    "actor_rollout_ref.model.trust_remote_code": "set actor_rollout_ref.model.external_lib for code of a model",
    "actor_rollout_ref.model.custom_chat_template": "put the template into the tokenizer's directory",
    "actor_rollout_ref.model.enable_activation_offload": "set model.activation_checkpointing=layer",
    f"{LORA}.lora": f"it is of verl's Megatron engine. Set {LORA}.lora_rank, lora_alpha and target_modules",
    f"{LORA}.target_parameters": f"adapters go to linear layers, which {LORA}.target_modules names",
    "actor_rollout_ref.model.use_fused_kernels": (
        "the LM head is computed in chunks anyway; for less memory, set "
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    ),
    f"{_FSDP}.strategy": "set actor_rollout_ref.actor.strategy",
    "data.custom_cls": "prepared documents have a class of their own",
    "actor_rollout_ref.actor.data_loader_seed": "set data.seed",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": (
        "set actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu, which counts documents"
    ),
    f"{_OPTIM}.total_training_steps": "set trainer.total_training_steps",
    "trainer.max_critic_ckpt_to_keep": "set trainer.max_actor_ckpt_to_keep",
}
"""What to use instead of a key that does nothing, or of all in a section; the longest entry counts."""


def check_acting(config: DictConfig) -> None:
    """Refuse values of keys that nobody reads, unless they are the defaults.

    Args:
        config: resolved.

    Raises:
        ConfigError: with what to use instead.
    """
    defaults = _defaults()
    for key, value in _inert(config):
        if (key in defaults and _same(value, defaults[key])) or _follows(config, key, value):
            continue
        condition = _condition(key)
        if condition and value is None:  # verl's own default
            continue
        reason = INSTEAD.get(next(filter(INSTEAD.__contains__, _upwards(key)), ""), "REFINE does not read this key")
        if key in ONLY_WITH_ADAPTERS:
            reason = f"there are no adapters with {LORA}.lora_rank=0"
        if condition:
            other, choice = condition[0]
            reason = f"it is read with {other}={str(choice).lower() if choice is True else choice} only"
        shown = str(value).lower() if isinstance(value, bool) else value
        raise ConfigError(key, f"{shown} would have no effect: {reason}. Leave it out.")


@functools.cache
def _defaults() -> dict[str, Any]:
    """Every key's default where nothing is set."""
    schema = OmegaConf.create(OmegaConf.to_container(base_schema(), resolve=False))
    OmegaConf.resolve(schema)
    return dict(leaves(DictConfig(schema)))


def _follows(config: DictConfig, key: str, value: Any) -> bool:
    """Whether the key, or a section it is in, is an interpolation in the defaults that gives this value here."""
    written = _written()
    place = next((place for place in _upwards(key) if "${" in str(written.get(place))), None)
    if place is None:
        return False
    path, _, name = place.rpartition(".")
    section = OmegaConf.select(config, path) if path else config
    fields = OmegaConf.to_container(section, resolve=False)
    parent = section._get_parent()
    assert isinstance(fields, dict) and (parent is None or isinstance(parent, DictConfig))
    beside = OmegaConf.create({**fields, name: written[place]}, parent=parent)
    return _same(value, OmegaConf.select(beside, f"{name}{key.removeprefix(place)}"))


@functools.cache
def _written() -> dict[str, Any]:
    return dict(leaves(base_schema()))


def _same(value: Any, other: Any) -> bool:
    return bool(value == other or (value != value and other != other))  # NaN follows NaN


def acts(key: str, config: DictConfig) -> bool:
    """Whether a key of verl, or a section it is in, has an effect with this configuration."""
    if key == "algorithm.gamma":  # answers differ in length, and this estimator discounts by it
        refine = config.refine
        # and rollouts of the prompts, which it compares too, have one outcome each: nothing to discount
        reinforced = refine.phase == "posttrain" and refine.outer == "grpo" and refine.inner != "refine"
        return bool(reinforced and config.algorithm.adv_estimator == "reinforce_plus_plus")
    if key in ONLY_WITH_ADAPTERS and not config.actor_rollout_ref.model.lora_rank:
        return False
    condition = _condition(key)
    if condition and not any(_may_be(config, *choice) for choice in condition):
        return False
    return any(place in ACTING for place in _upwards(key))


def _condition(key: str) -> tuple[tuple[str, object], ...]:
    """With which choices a key, or the section it is in, acts; none: always."""
    return next((ONLY_WITH[place] for place in _upwards(key) if place in ONLY_WITH), ())


def _may_be(config: DictConfig, key: str, choice: object) -> bool:
    """Whether a key has this value, or one of a user's that nothing is known of."""
    value = OmegaConf.select(config, key)
    return bool(value == choice or (key == f"{_POLICY}.loss_mode" and value not in VERLS_LOSSES))


def _inert(config: DictConfig) -> Iterator[tuple[str, Any]]:
    own = {setting.key for setting in list_settings(DataSettings, PromptSettings)}
    for key, value in leaves(config):
        if key.startswith(("refine.", "model.")) or key in FIXED or key in FOLLOWERS:
            continue
        if not any(place in own for place in _upwards(key)) and not acts(key, config):
            yield key, value


def _upwards(key: str) -> Iterator[str]:
    """The key and the sections it is in, the innermost first."""
    while key:
        yield key
        key = key.rpartition(".")[0]
