"""REFINE's training loop on verl's v1 PPO trainer.

verl keeps the data loader and its state, checkpoints, resume, loggers, profiling and the Ray worker group. What is
different is the step: rollouts come from forked states inside the training worker, so there is no inference engine,
no replay buffer and no weight transfer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.device import get_device_name, get_resource_name
from verl.utils.tracking import Tracking
from verl.workers.config import TrainingWorkerConfig

from refine_verl.config import ModelSettings, RefineSettings, RunFailed
from refine_verl.config.data import longest_possible
from refine_verl.data.dataset import collate_columns, pad_batch
from refine_verl.nsp import rollout_metrics
from refine_verl.plugin import ENGINE_MODEL_TYPE
from refine_verl.record.metrics import MetricsWriter, read_metrics
from refine_verl.record.progress import TrainingProgress
from refine_verl.record.redaction import redacted
from refine_verl.trainer.saving import CheckpointingTrainer
from refine_verl.workers.advantage import compute_advantages
from refine_verl.workers.loss import RefineLoss
from refine_verl.workers.objective import Objective
from refine_verl.workers.schedule import warmup_steps
from refine_verl.workers.worker import NSPRolloutWorker, WorkerSettings, worker_threads

logger = logging.getLogger(__name__)

Record = Callable[[dict[str, float]], None]

MAX_SKIPPED_UPDATES = 5
"""So many updates in a row with a NaN or infinite gradient end the run."""


class ResourceError(RunFailed):
    """The cluster is too small for the run, or has become so."""


class TrainingDiverged(RunFailed):
    """Gradients stayed NaN or infinite; a checkpoint of the last good weights was written."""


class RefineTrainer(CheckpointingTrainer):
    """Mid-training with REFINE, or with the next-token loss alone (``refine.loss.rl_coef: 0``)."""

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.trainer_mode = "sync"  # every TransferQueue branch of the base class is for the other modes
        self.settings = RefineSettings.from_mapping(config.refine)
        self.skipped_in_a_row = 0
        self.updates_made = self.updates_skipped = 0
        self.train_dataloader_it: Iterator[Any] | None = None

    # Set-up: what PPOTrainer creates for rollout engines does not exist here

    def _build_replay_buffer(self) -> None:
        return None

    def _setup(self) -> None:
        self._init_tokenizer()
        self._init_dataloader()
        self._init_dump_executor()
        trainer = self.config.trainer
        self.pool = worker_pool(trainer.n_gpus_per_node, trainer.nnodes)
        self.actor_rollout_wg = RayWorkerGroup(
            resource_pool=self.pool,
            ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(NSPRolloutWorker), config=self._worker_config()),
            device_name=trainer.device,
        )
        self.actor_rollout_wg.reset()
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(RefineLoss(self.settings.loss, actor))
        self._load_checkpoint()

    def _worker_config(self) -> TrainingWorkerConfig:
        section = self.config.actor_rollout_ref
        actor = omega_conf_to_dataclass(section.actor)
        engine = actor.engine
        engine.use_dynamic_bsz = False
        engine.micro_batch_size_per_gpu = actor.ppo_micro_batch_size_per_gpu
        engine.infer_micro_batch_size_per_gpu = section.rollout.log_prob_micro_batch_size_per_gpu
        return TrainingWorkerConfig(
            model_type=ENGINE_MODEL_TYPE,
            model_config=omega_conf_to_dataclass(section.model),
            engine_config=engine,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
            profiler_config=omega_conf_to_dataclass(section.actor.profiler),
            extra_context={"worker": self._worker_settings()},
        )

    def _worker_settings(self) -> WorkerSettings:
        return WorkerSettings(
            refine=self.settings,
            model=ModelSettings.from_mapping(self.config.model),
            seed=self.config.data.seed,
            max_length=longest_possible(self.config.data, self.settings.phase),
            rollout_micro_batch_size=self.config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu,
            threads=worker_threads(self.config.trainer.n_gpus_per_node),
            algorithm=dict(self.config.algorithm),
        )

    def on_step_end(self) -> None:
        return None

    def on_sample_end(self) -> None:
        return None

    # The loop

    def fit(self) -> None:  # verl passes an agent loop manager, there is none here
        """Train to ``total_training_steps``, from the checkpoint if there is one; then export the model.

        Raises:
            TrainingDiverged: see :data:`MAX_SKIPPED_UPDATES`; or not one update was made.
        """
        trainer = self.config.trainer
        if not trainer.val_only:
            self._warn_if_past_the_last_step()
            self._warn_if_the_rate_only_rises()
        # a fresh run measures step 0 again too; validation alone takes nothing away
        resume_step = None if trainer.val_only else self.global_steps or -1
        with self._recorder(resume_step) as record:
            self._before_the_first_step(record)
            self.on_train_begin()
            with self.signals.deferred():
                while self.global_steps < self.total_training_steps and not trainer.val_only:
                    self.global_steps += 1
                    record(self._train_one_step())
                    saved = self._is_due(trainer.save_freq)
                    self._stop_if_diverged(saved)
                    self._stop_if_asked(saved)
            self._refuse_to_have_learnt_nothing()
            self.on_train_end()
        self._shutdown_dump_executor()
        if not trainer.val_only:
            with self.signals.deferred():
                self._export()

    def _warn_if_the_rate_only_rises(self) -> None:
        optim = self.config.actor_rollout_ref.actor.optim
        rising = warmup_steps(optim)
        if rising > self.total_training_steps:
            logger.warning(
                "the learning rate warms up for %d steps (actor_rollout_ref.actor.optim.lr_warmup_steps) and the run "
                "has %d: it ends at %.3g and never reaches %.3g",
                rising,
                self.total_training_steps,
                optim.lr * self.total_training_steps / rising,
                optim.lr,
            )

    def _before_the_first_step(self, record: Record) -> None:
        """Validate a fresh run; of a resumed one record the step whose line an interruption took."""
        trainer = self.config.trainer
        if (trainer.val_only or trainer.val_before_train and not self.global_steps) and len(self.val_dataset):
            record(self._validate())
        elif self.lost_metrics is not None:
            record(self._completed(self.lost_metrics))

    @contextmanager
    def _recorder(self, resume_step: int | None) -> Iterator[Record]:
        """A function that records the metrics of the current step: in metrics.jsonl, loggers and the display."""
        trainer = self.config.trainer
        path = self.run_dir / "metrics.jsonl"
        writer = MetricsWriter(path, resume_step=resume_step)
        tracking = Tracking(
            project_name=trainer.project_name,
            experiment_name=trainer.experiment_name,
            default_backend=_trackers(trainer.logger),
            config=redacted(OmegaConf.to_container(self.config, resolve=True)),
        )
        self._start_profile_schedule()
        history = read_metrics(path) if self.global_steps > 0 else []
        with TrainingProgress(self.total_training_steps, initial=self.global_steps, history=history) as progress:

            def record(metrics: dict[str, float]) -> None:
                writer.log(metrics, step=self.global_steps)
                tracking.log(data=metrics, step=self.global_steps)
                progress.update(self.global_steps, metrics)

            try:
                yield record
            finally:
                with suppress(OSError):  # of a full disk, which the error under way is about
                    writer.close()

    def _train_one_step(self) -> dict[str, float]:
        trainer = self.config.trainer
        metrics: dict[str, float] = {}
        timing: dict[str, float] = {}
        with marked_timer("step", timing):
            self.on_step_begin()
            self._start_profiling()
            tokens = self.step(metrics, timing)
            self._stop_profiling()
            self.on_step_end()
        metrics["perf/tokens_per_second"] = tokens / timing["step"]
        metrics["refine/active"] = float(self._uses_rollouts())
        self.step_metrics = {**metrics, **_seconds(timing)}
        if self._is_due(trainer.save_freq):
            with marked_timer("save_checkpoint", timing):
                self._save_checkpoint()
        return self._completed({**metrics, **_seconds(timing)})

    def _completed(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a step, with those of the validation if it is due."""
        timing: dict[str, float] = {}
        scores: dict[str, float] = {}
        if self._is_due(self.config.trainer.test_freq) and len(self.val_dataset):
            with marked_timer("validate", timing):
                scores = self._validate()
        return {**metrics, **scores, **_seconds(timing)}

    def _is_due(self, frequency: int) -> bool:
        last = self.global_steps >= self.total_training_steps
        return frequency > 0 and (last or self.global_steps % frequency == 0)

    def step(self, metrics: dict[str, float], timing_raw: dict[str, float]) -> int:
        """The paper's four steps on one batch of documents. Returns the number of document tokens."""
        batch = self._to_batch(self._next_columns())
        forward_tokens, _ = self.learn(batch, metrics, timing_raw)
        document_tokens = int(batch["lengths"].sum())
        metrics["perf/forward_tokens_per_token"] = forward_tokens / document_tokens
        return document_tokens

    def learn(
        self, batch: TensorDict, metrics: dict[str, float], timing_raw: dict[str, float], **how: Any
    ) -> tuple[float, Tensor | None]:
        """The paper's four steps on documents or prompts.

        Args:
            batch: of :meth:`_to_batch`; rows of weight 0 teach nothing.
            metrics, timing_raw: what was measured is added.
            how: for :meth:`_update`.

        Returns:
            Tokens put through the model, and the rewards [B, c, n] of the rollouts.
        """
        if not self._uses_rollouts():
            with marked_timer("update", timing_raw):
                return self._update(batch, Objective.DOCUMENTS, metrics, **how), None
        every = self.settings.gradient_snr_every
        if every and self.global_steps % every == 0:
            how["measure_gradients"] = True
        if self.settings.on_policy:
            return self._learn_on_policy(batch, metrics, timing_raw, **how)
        # 1-3: choose positions, write rollouts, reward them, all next to the model
        with marked_timer("rollout", timing_raw):
            rollouts = self.actor_rollout_wg.rollout_and_reward(batch).get()
        _move_time(timing_raw, "rollout", rollouts)
        rollouts["advantages"] = compute_advantages(rollouts, self.settings.nsp, self.config.algorithm)
        metrics.update(rollout_metrics(rollouts[batch["weight"] > 0], self.settings.nsp.group))
        needed = ("positions", "rollout_tokens", "rollout_lengths", "old_log_probs", "advantages", "routes")
        # lengths where they differ, and routes of a model with experts only
        batch.update(rollouts.select(*needed, strict=False))
        # 4: one optimiser step per mini-batch
        with marked_timer("update", timing_raw):
            forward_tokens = self._update(batch, Objective.ROLLOUTS, metrics, **how)
        return forward_tokens + float(rollouts["forward_tokens"].sum()), rollouts["rewards"]

    def _learn_on_policy(
        self, batch: TensorDict, metrics: dict[str, float], timing_raw: dict[str, float], **how: Any
    ) -> tuple[float, Tensor]:
        """All four steps in the trained passes (``refine.on_policy``); see `learn`."""
        nsp = self.settings.nsp
        batch["row"] = torch.arange(len(batch))
        how.update(rollouts_per_row=nsp.chunks * nsp.rollouts_per_position, rollout_length=nsp.longest_rollout)
        with marked_timer("update", timing_raw):
            forward_tokens = self._update(batch, Objective.ON_POLICY, metrics, **how)
        parts = self.actor_rollout_wg.take_rollouts()
        taken = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        rollouts = tu.get_tensordict(tensor_dict=taken)
        _move_time(timing_raw, "update", rollouts)
        rollouts = rollouts[rollouts["row"].argsort()]
        metrics.update(rollout_metrics(rollouts[batch["weight"] > 0], nsp.group))
        return forward_tokens, rollouts["rewards"]

    def _uses_rollouts(self) -> bool:
        return self.settings.uses_rollouts and self.global_steps > self.settings.warmup_steps

    def _next_columns(self) -> dict[str, Any]:
        """The rows of the next batch, column by column, as verl's collate function leaves them."""
        if self.train_dataloader_it is None:
            self.train_dataloader_it = iter(self.train_dataloader)
        try:
            return next(self.train_dataloader_it)
        except StopIteration:
            # the end of an epoch, or a checkpoint written exactly there
            self.train_dataloader_it = iter(self.train_dataloader)
            return next(self.train_dataloader_it)

    def _to_batch(self, columns: dict[str, Any], multiple: int = 1) -> TensorDict:
        """Padded tensors of one batch; dummies of weight 0 fill it up to ``multiple`` rows."""
        return self._message(collate_columns(columns), multiple)

    def _message(self, tensors: dict[str, Tensor], multiple: int = 1, step: int | None = None) -> TensorDict:
        """A batch for the workers; random draws depend on ``step`` (None: the step of the run)."""
        return tu.get_tensordict(
            tensor_dict=pad_batch(tensors, multiple),
            non_tensor_dict={"global_step": self.global_steps if step is None else step},
        )

    def _update(
        self,
        batch: TensorDict,
        objective: Objective,
        metrics: dict[str, float],
        name: str = "actor",
        size: int | None = None,
        **how: Any,
    ) -> float:
        """One optimiser step per mini-batch; returns the number of tokens put through the model.

        Every mini-batch holds the same documents however many ranks share it: ranks get contiguous shares of the
        batch and cut them into mini-batches themselves, so rows are ordered first.

        Args:
            batch: a multiple of ``size`` rows, with all that ``objective`` asks for.
            objective: what is to be learned.
            metrics: what was measured is added, to earlier passes of the same step.
            name: what its names begin with.
            size: rows of a mini-batch; None: ``refine.ppo_mini_batch_size``.
            how: more for the worker's ``update``.
        """
        size = size or self.settings.ppo_mini_batch_size
        order = mini_batch_order(len(batch), size, self.actor_rollout_wg.world_size)
        data = tu.index_select_tensor_dict(batch, order)
        tu.assign_non_tensor(
            data,
            objective=objective,
            mini_batch_size=size,
            epochs=self.config.actor_rollout_ref.actor.ppo_epochs,
            seed=self.config.data.seed,
            use_dynamic_bsz=False,
            **how,
        )
        updated = tu.get(self.actor_rollout_wg.update(data).get(), "metrics")
        skipped = metrics.get(f"{name}/skipped_updates", 0.0)
        metrics.update(self._update_metrics(updated, name))
        measured = {"nsp/gradient_snr", "nsp/gradient_cosine_ntp"} & updated.keys()
        measured |= {key for key in updated if key.startswith("answers/")}
        metrics.update({key: updated[key][0] for key in measured})
        metrics[f"{name}/skipped_updates"] += skipped
        return float(updated["forward_tokens"][0])

    # Numbers

    def _update_metrics(self, updated: dict[str, list[float]], name: str) -> dict[str, float]:
        """Means over the step's mini-batches; skipped updates are counted and left out of the means."""
        norms = updated["grad_norm"]
        for norm in norms:
            if self.skipped_in_a_row < MAX_SKIPPED_UPDATES:  # a good update after that many comes too late
                self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        skipped = sum(not math.isfinite(norm) for norm in norms)
        self.updates_skipped += skipped
        self.updates_made += len(norms) - skipped
        if skipped:
            logger.warning(
                "step %d: %d of %d updates skipped, their gradient was NaN or infinite",
                self.global_steps,
                skipped,
                len(norms),
            )
        means = {
            f"{name}/{key.removeprefix('actor/')}": _finite_mean(values)
            for key, values in updated.items()
            if key.startswith("actor/")
        }
        if "actor/log_prob_gap" in updated:  # later mini-batches have weights that have moved
            means[f"{name}/log_prob_gap"] = _finite_mean(updated["actor/log_prob_gap"][:1])
        if "nsp/expert_agreement" in updated:
            means["nsp/expert_agreement"] = _finite_mean(updated["nsp/expert_agreement"][:1])
        return {
            **means,
            f"{name}/grad_norm": _finite_mean(norms),
            f"{name}/skipped_updates": float(skipped),
            "actor/lr": float(updated["lr"][-1]),
            "perf/max_memory_gb": float(max(updated["perf/max_memory_allocated_gb"])),
        }

    def _stop_if_diverged(self, saved: bool) -> None:
        if self.skipped_in_a_row < MAX_SKIPPED_UPDATES:
            return
        if not saved:
            self._save_checkpoint()
        raise TrainingDiverged(
            f"step {self.global_steps}: {self.skipped_in_a_row} updates in a row had a NaN or infinite gradient and "
            f"were skipped. The weights before them are in {self.run_dir}/global_step_{self.global_steps}. "
            "Try a lower learning rate (actor_rollout_ref.actor.optim.lr) or look at the data of this step."
        )

    def _refuse_to_have_learnt_nothing(self) -> None:
        if self.updates_skipped and not self.updates_made:
            raise TrainingDiverged(
                f"all {self.updates_skipped} updates had a NaN or infinite gradient and were skipped: the weights are "
                "those it began with. Look at the model (`python -m refine_verl.evaluate ... tasks=ntp`), then at the "
                "learning rate (actor_rollout_ref.actor.optim.lr)."
            )

    def _validate(self, *_: Any) -> dict[str, float]:
        """Next-token loss and accuracy over every token of every validation document, each counted once."""
        totals = torch.zeros(3, dtype=torch.float64)
        for columns in self.val_dataloader:
            batch = self._to_batch(columns, multiple=self.actor_rollout_wg.world_size)
            scores = self.actor_rollout_wg.score(batch).get()
            counts = torch.stack([scores["loss"], scores["correct"].double(), batch["lengths"].double() - 1])
            totals += counts @ batch["weight"].double()
        loss, correct, tokens = totals.tolist()
        return {"val/ntp_loss": loss / tokens, "val/ntp_accuracy": correct / tokens}

    def _start_profile_schedule(self) -> None:
        """verl's profiling hooks look at the step after the current one."""
        steps = self.config.global_profiler.steps
        self.prev_step_profile = False
        self.curr_step_profile = steps is not None and self.global_steps + 1 in steps
        self.next_step_profile = False


def worker_pool(per_node: int, nodes: int) -> RayResourcePool:
    """A place per GPU, or per CPU where there is no GPU, which a worker has for itself.

    Raises:
        ResourceError: the cluster has fewer.
    """
    resource, needed = get_resource_name(), per_node * nodes
    available = ray.cluster_resources().get(resource, 0)
    if available < needed:
        raise ResourceError(
            f"the Ray cluster has {available:g} {resource}s, the run asks for {needed} workers on "
            f"{get_device_name()} (trainer.n_gpus_per_node * trainer.nnodes); lower these or add nodes"
        )
    return RayResourcePool([per_node] * nodes, use_gpu=True, max_colocate_count=1, name_prefix="workers")


def mini_batch_order(rows: int, size: int, ranks: int) -> list[int]:
    """Order in which rows 0..rows-1 go to ``ranks`` equal contiguous shares so that mini-batch m is rows m*size...

    >>> mini_batch_order(rows=8, size=4, ranks=2)
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    share = size // ranks
    return [
        start + rank * share + offset
        for rank in range(ranks)
        for start in range(0, rows, size)
        for offset in range(share)
    ]


def _trackers(logger: str | list[str]) -> list[str]:
    """What `trainer.logger` names besides the console, where `TrainingProgress` shows every step in one line."""
    return [name for name in ([logger] if isinstance(logger, str) else logger) if name != "console"]


def _move_time(timing: dict[str, float], phase: str, rollouts: TensorDict) -> None:
    """What workers took for rewards, the slowest of them, is the reward's time and not that of the phase around it."""
    judged = float(rollouts.pop("reward_seconds").max())
    timing["reward"] = timing.get("reward", 0.0) + judged
    timing[phase] -= judged


def _seconds(timing: dict[str, float]) -> dict[str, float]:
    return {f"timing_s/{name}": seconds for name, seconds in timing.items()}


def _finite_mean(values: list[float]) -> float:
    finite = [float(value) for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
