"""What each key may hold, written down apart from the code that checks it. Others are not known to act."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

HUGE = 99999999999999999999999


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """Values of a key: everything else must be refused."""

    kind: str
    null: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether the value may be accepted; it may still contradict another key."""
        if value is None:
            return self.null
        if self.kind in ("integer", "number"):
            return self._allows_number(value)
        if self.kind == "boolean":
            return isinstance(value, bool)
        if self.kind == "names":
            items = value if isinstance(value, list) else [value]
            return all(isinstance(item, str) and item.strip() for item in items)
        if self.kind == "mapping":
            return isinstance(value, dict)
        if self.kind == "pair":
            return isinstance(value, list) and len(value) == 2
        if self.choices:
            return value in self.choices
        return isinstance(value, (str, int, float)) and not isinstance(value, bool) and bool(str(value).strip())

    def _allows_number(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        if self.kind == "integer" and not isinstance(value, int):
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )


def _integer(least: int, most: int | None = None, null: bool = False) -> Domain:
    return Domain(kind="integer", least=least, most=most, null=null)


def _text(*choices: str, null: bool = False) -> Domain:
    return Domain(kind="text", choices=choices, null=null)


_BOOL = Domain(kind="boolean")
_POSITIVE = Domain(kind="number", above=0)
_NOT_NEGATIVE = Domain(kind="number", least=0)
_SHARE = Domain(kind="number", least=0, most=1)
_NAMES = Domain(kind="names")
_SEED = _integer(0, 2**63 - 1)

# Of every phase.
COMMON: dict[str, Domain] = {
    "refine.phase": _text("documents", "posttrain", "ttt"),
    "refine.inner": _text("none", "sft", "refine"),
    "refine.outer": _text("none", "sft", "grpo"),
    "refine.ppo_mini_batch_size": _integer(1),
    "refine.on_policy": _BOOL,
    "refine.warmup_steps": _integer(0),
    "refine.gradient_snr_every": _integer(0),
    "refine.gradient_cosine": _BOOL,
    "refine.nsp.end_tokens": _text("sampled", "suppressed"),
    "refine.outer_mini_batch_size": _integer(1, null=True),
    "refine.loss.old_log_probs": _text("rollout", "recomputed"),
    "refine.nsp.chunks": _integer(1),
    "refine.nsp.rollout_length": _integer(1),
    "refine.nsp.rollouts_per_position": _integer(1),
    "refine.nsp.selection": _text("entropy", "uniform", "max_entropy", "min_entropy", "surprise", "query"),
    "refine.nsp.question_tokens": _integer(1),
    "refine.nsp.anchor": _text("prediction", "token"),
    "refine.nsp.entropy_temperature": _POSITIVE,
    "refine.nsp.smoothing_window": _integer(1, null=True),
    "refine.nsp.temperature": _POSITIVE,
    "refine.nsp.reward": _text("cosine", "binary", "hybrid", "edit"),
    "refine.nsp.group": _text("sequence", "position"),
    "refine.nsp.credit": _text("rollout", "token"),
    "refine.nsp.grad_scope": _text("full", "branch"),
    "refine.nsp.rollouts_together": _integer(1),
    "refine.nsp.rollout": _text("fork", "prefix"),
    "refine.loss.rl_coef": _NOT_NEGATIVE,
    "refine.loss.sft_coef": _NOT_NEGATIVE,
    "model.path": _text(null=True),
    "model.tokenizer": _text(null=True),
    "model.activation_checkpointing": _text("none", "layer", "segment"),
    "model.reading": _text("whole", "segments"),
    "model.balance_coef": _NOT_NEGATIVE,
    "data.train_files": _NAMES,
    "data.val_files": Domain(kind="names", null=True),
    "data.cache_dir": _text(null=True),
    "data.num_workers": _integer(1, 2**20, null=True),
    "data.progress": Domain(kind="boolean", null=True),
    "data.train_batch_size": _integer(1),
    "data.val_batch_size": _integer(1),
    "data.train_max_samples": _integer(-1),
    "data.val_max_samples": _integer(-1),
    "data.seed": _SEED,
    "data.shuffle": _BOOL,
    "data.dataloader_num_workers": _integer(0, 2**20),
    "actor_rollout_ref.actor.strategy": _text("fsdp2"),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": _integer(1),
    "actor_rollout_ref.actor.clip_ratio": _NOT_NEGATIVE,
    "actor_rollout_ref.actor.clip_ratio_low": Domain(kind="number", least=0, null=True),
    "actor_rollout_ref.actor.clip_ratio_high": Domain(kind="number", least=0, null=True),
    "actor_rollout_ref.actor.clip_ratio_c": Domain(kind="number", above=1),
    "actor_rollout_ref.actor.loss_agg_mode": _text(
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ),
    "actor_rollout_ref.actor.ppo_epochs": _integer(1),
    "actor_rollout_ref.actor.policy_loss.loss_mode": _text("vanilla"),
    "actor_rollout_ref.actor.checkpoint.save_contents": _NAMES,
    "actor_rollout_ref.actor.checkpoint.load_contents": _NAMES,
    "actor_rollout_ref.actor.optim.optimizer": _text("AdamW", "Adam", "SGD"),
    "actor_rollout_ref.actor.optim.optimizer_impl": _text("torch.optim"),
    "actor_rollout_ref.actor.optim.lr": _POSITIVE,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": _integer(-1),
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": _SHARE,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": _text("constant", "cosine"),
    "actor_rollout_ref.actor.optim.min_lr_ratio": Domain(kind="number", least=0, most=1, null=True),
    "actor_rollout_ref.actor.optim.weight_decay": _NOT_NEGATIVE,
    "actor_rollout_ref.actor.optim.betas": Domain(kind="pair"),
    "actor_rollout_ref.actor.optim.clip_grad": _POSITIVE,
    "actor_rollout_ref.actor.optim.num_cycles": Domain(kind="number"),
    "actor_rollout_ref.actor.optim.zero_indexed_step": _BOOL,
    "actor_rollout_ref.actor.optim.override_optimizer_config": Domain(kind="mapping", null=True),
    "actor_rollout_ref.actor.fsdp_config.param_offload": _BOOL,
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": _BOOL,
    "actor_rollout_ref.actor.fsdp_config.offload_policy": _BOOL,
    "actor_rollout_ref.actor.fsdp_config.reshard_after_forward": _BOOL,
    "actor_rollout_ref.actor.fsdp_config.forward_prefetch": _BOOL,
    "actor_rollout_ref.actor.fsdp_config.full_determinism": _BOOL,
    "actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation": _BOOL,
    "actor_rollout_ref.actor.fsdp_config.fsdp_size": _integer(-1),
    "actor_rollout_ref.actor.fsdp_config.wrap_policy.min_num_params": _integer(0),
    "actor_rollout_ref.actor.fsdp_config.model_dtype": _text("fp32", "float32"),
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": _text("fp32", "float32"),
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype": _text("fp32", "bf16", "fp16"),
    "actor_rollout_ref.model.external_lib": Domain(kind="names", null=True),
    "actor_rollout_ref.model.lora_rank": _integer(0),
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": _integer(1),
    "algorithm.adv_estimator": _text("grpo", "rloo", "reinforce_plus_plus"),
    "algorithm.norm_adv_by_std_in_grpo": _BOOL,
    "trainer.total_epochs": _integer(1),
    "trainer.total_training_steps": _integer(1, null=True),
    "trainer.project_name": _text(),
    "trainer.experiment_name": _text(),
    "trainer.logger": Domain(kind="names"),
    "trainer.nnodes": _integer(1),
    "trainer.n_gpus_per_node": _integer(1),
    "trainer.device": _text("cpu"),
    "trainer.save_freq": _integer(-1),
    "trainer.test_freq": _integer(-1),
    "trainer.val_before_train": _BOOL,
    "trainer.val_only": _BOOL,
    "trainer.resume_mode": _text("auto", "disable"),
    "trainer.resume_from_path": _text(null=True),
    "trainer.max_restarts": _integer(0),
    "trainer.max_actor_ckpt_to_keep": _integer(1, null=True),
    "trainer.default_local_dir": _text(),
}

DOCUMENTS: dict[str, Domain] = {
    "data.text_key": _text(),
    "data.max_length": _integer(1, null=True),
    "data.min_length": _integer(1, null=True),
    "data.long_documents": _text("window", "head"),
    "data.append_eos": _BOOL,
}

PROMPTS: dict[str, Domain] = {
    "data.prompt_key": _text(),
    "data.answer_key": _text(null=True),
    "data.task_key": _text(),
    "data.task": _text(null=True),
    "data.id_key": _text(null=True),
    "data.chat_template": _BOOL,
    "data.answer_separator": _text(" ", "", "\n"),
    "data.max_prompt_length": _integer(1, null=True),
    "data.max_answer_length": _integer(1, null=True),
    "data.overlong_prompts": _text("error", "middle", "left", "right"),
    "data.max_new_tokens": _integer(1),
    "refine.answers.engine": _text("own", "vllm"),
    "refine.answers.gap_warning": _POSITIVE,
    "refine.answers.samples": _integer(2),
    "refine.answers.temperature": _POSITIVE,
    "refine.answers.convention": _text("paper", "lm_eval", "official"),
}

TTT: dict[str, Domain] = {
    "refine.ttt.reset": _text("batch", "sample", "none"),
    "refine.ttt.steps": _integer(1),
    "refine.ttt.baseline": _BOOL,
    "refine.ttt.curve": _BOOL,
    "refine.ttt.keep": _text(null=True),
}

EVALUATE: dict[str, Domain] = {
    "batch_size": _integer(1),
    "limit": _integer(1, null=True),
    "ttt": _text("none", "sft", "refine"),
    "tokenizer": _text(null=True),
    "engine": _text("own", "vllm"),
    "max_model_len": _integer(2, null=True),
    "gpu_memory_utilization": Domain(kind="number", above=0, most=1, null=True),
}

INSPECT: dict[str, Domain] = {
    "max_length": _integer(2),
    "seed": _SEED,
    "tokenizer": _text(null=True),
    "refine.nsp.chunks": _integer(1),
    "refine.nsp.rollout_length": _integer(1),
    "refine.nsp.selection": _text("entropy", "uniform", "max_entropy", "min_entropy", "surprise", "query"),
    "refine.nsp.question_tokens": _integer(1),
    "refine.nsp.temperature": _POSITIVE,
    "refine.nsp.reward": _text("cosine", "binary", "hybrid", "edit"),
}

NOT_JUDGED = (
    "model.config",
    "model.config_tokenizer",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.override_config",
    "actor_rollout_ref.model.hf_config_path",
    "actor_rollout_ref.model.use_shm",
    "actor_rollout_ref.model.lora_alpha",
    "actor_rollout_ref.model.target_modules",
    "actor_rollout_ref.model.exclude_modules",
    "actor_rollout_ref.model.lora_adapter_path",
    "actor_rollout_ref.model.custom_chat_template",
    "actor_rollout_ref.actor.profiler",
    "actor_rollout_ref.actor.policy_loss",
    "actor_rollout_ref.actor.loss_scale_factor",
    "actor_rollout_ref.actor.tau_pos",
    "actor_rollout_ref.actor.tau_neg",
    "actor_rollout_ref.actor.fsdp_config.seed",
    "actor_rollout_ref.actor.optim.warmup_style",
    "global_profiler",
    "ray_kwargs.ray_init",
    "data.custom_cls",
    "data.validation_shuffle",
    "trainer.del_local_ckpt_after_load",
    "trainer.checkpoint_callback_class",
)
"""Keys (and sections) that act in some runs only, or of which another place decides: no mutation of them is tried."""
