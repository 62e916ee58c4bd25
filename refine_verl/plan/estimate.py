"""Everything a plan says, worked out from a checked configuration."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refine_verl.compose.validate import ValidConfig
from refine_verl.config.data import longest_possible
from refine_verl.kernels.patch import accelerator_available
from refine_verl.models.actor import SNAPSHOTS_PER_CHUNK, snapshot_count
from refine_verl.models.pieces import piece_count
from refine_verl.models.rollouts import documents_together
from refine_verl.plan.memory import FP32, MemoryEstimate, Shape
from refine_verl.plan.origins import Origin
from refine_verl.plan.reading import Reading
from refine_verl.plan.servers import ANSWERS, Servers
from refine_verl.record.disk_space import existing, same_file_system
from refine_verl.record.format import size_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What the run does with what it reads.

    Attributes:
        steps: steps of the whole run.
        epochs: how often the data is read in them.
        tokens_per_step: document tokens.
        optimiser_steps_per_step: mini-batches, times PPO epochs.
        forward_tokens_per_token: tokens put through the model per document token, at most; None for
            ``refine.nsp.rollout=prefix``, which recomputes every prefix.
        passes: passes of one worker through the model per step, by kind.
    """

    steps: int
    epochs: float
    tokens_per_step: float
    optimiser_steps_per_step: int
    forward_tokens_per_token: float | None
    passes: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes: one checkpoint, all that are kept with the final model, and what is free at ``place``.

    Attributes:
        place: the run directory, or the nearest directory above it that exists.
        checkpoint, checkpoints_kept, checkpoints_at_once: size of one, and how many there are.
        final_model: or the final adapter; 0 where test-time training resets, as nothing is written then.
        free: at ``place``.
        adapter, adapters_kept: size and number of those in `refine.ttt.keep`.
        adapters_place, adapters_free: as ``place`` and ``free``, where they are on another file system; else None.
    """

    place: str
    checkpoint: int
    checkpoints_kept: int
    checkpoints_at_once: int
    final_model: int
    free: int
    adapter: int = 0
    adapters_kept: int = 0
    adapters_place: str | None = None
    adapters_free: int | None = None

    @property
    def adapters(self) -> int:
        """Bytes of all in `refine.ttt.keep`."""
        return self.adapter * self.adapters_kept

    @property
    def needed(self) -> int:
        """Bytes at the peak at ``place``: a checkpoint is complete before the oldest one goes."""
        beside = self.adapters if self.adapters_place is None else 0
        return beside + max(
            self.checkpoint * self.checkpoints_at_once, self.checkpoint * self.checkpoints_kept + self.final_model
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it; `as_json` is what ``--json`` prints."""

    origins: list[Origin]
    train: Reading
    validation: Reading | None
    work: Work
    shape: Shape
    memory: MemoryEstimate
    memory_available: int | None
    seconds_per_step: float | None
    throughput: float | None
    throughput_from: str
    disk: Disk
    warnings: list[str]
    servers: Servers | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; bytes and seconds."""
        content = dataclasses.asdict(self)
        content["memory"] |= {"peak": self.memory.peak, "peak_phase": self.memory.peak_phase}
        content["disk"]["needed"] = self.disk.needed
        return content


def shape_of(valid: ValidConfig, longest: int) -> Shape:
    """What decides the memory of a worker."""
    actor, rollout = valid.config.actor_rollout_ref.actor, valid.config.actor_rollout_ref.rollout
    share = -(-valid.refine.ppo_mini_batch_size // valid.workers)
    batch_share = -(-int(valid.config.data.train_batch_size) // valid.workers)
    rollout_rows = min(int(rollout.log_prob_micro_batch_size_per_gpu), batch_share)
    return Shape(
        length=longest,
        longest=longest_possible(valid.config.data, valid.refine.phase),
        update_rows=min(int(actor.ppo_micro_batch_size_per_gpu), share),
        rollout_rows=rollout_rows,
        rollouts_of=min(documents_together(valid.refine.nsp, rollout_rows), batch_share),
        workers=valid.workers,
        nsp=valid.refine.nsp,
        with_rollouts=valid.refine.uses_rollouts,
        on_policy=valid.refine.on_policy,
        activation_checkpointing=valid.model.activation_checkpointing,
        reading=valid.model.reading,
        cuda=valid.config.trainer.device == "cuda",
        reshard=bool(actor.fsdp_config.reshard_after_forward),
        lora=valid.lora,
        resets=valid.refine.phase == "ttt" and valid.refine.ttt.reset != "none",
        gradients_held=(1 + valid.refine.gradient_cosine) if valid.refine.gradient_snr_every else 0,
        balance_coef=valid.model.balance_coef,
    )


def work_of(valid: ValidConfig, train: Reading, shape: Shape, traced: bool) -> Work:
    """Steps, passes and tokens.

    Args:
        valid: the configuration.
        train: what is read.
        shape: from `shape_of`.
        traced: whether the model gives its states in one uncut pass (as fla's do on the CPU).
    """
    config, nsp, at_test_time = valid.config, valid.refine.nsp, valid.refine.phase == "ttt"
    alone = at_test_time and valid.refine.ttt.reset == "sample"
    batch = 1 if alone else int(config.data.train_batch_size)
    mini = 1 if alone else valid.refine.ppo_mini_batch_size
    per_epoch = math.ceil(train.sequences / batch) if at_test_time else train.sequences // batch
    steps = config.trainer.total_training_steps or per_epoch * int(config.trainer.total_epochs)
    rounds = valid.refine.ttt.steps if at_test_time else 1
    if valid.refine.phase != "documents" and valid.refine.inner == "none":
        rounds = 0  # prompts are only there to be answered
    share = -(-mini // valid.workers)
    updates = rounds * -(-batch // mini) * int(config.actor_rollout_ref.actor.ppo_epochs)
    micro = -(-share // shape.update_rows)
    cuts = nsp.chunks + 1 if shape.activation_checkpointing == "segment" or (shape.with_rollouts and not traced) else 1
    passes = {"update": updates * micro * (cuts + (_pieces(shape, shape.update_rows) if shape.with_rollouts else 0))}
    if shape.writes_in_update:
        passes["write"] = updates * micro * _pieces(shape, shape.update_rows) * nsp.longest_rollout
        if shape.activation_checkpointing != "none":
            passes = {"read": updates * micro * _passes_of_a_reading(shape, traced), **passes}
    elif shape.with_rollouts:
        rows = batch // valid.workers or 1
        written = rounds * -(-rows // shape.rollouts_of) * _pieces(shape, shape.rollouts_of) * nsp.longest_rollout
        reads = rounds * -(-rows // shape.rollout_rows) * _passes_of_a_reading(shape, traced)
        passes = {"read": reads, "write": written, **passes}
    return Work(
        steps=int(steps),
        epochs=steps / per_epoch if per_epoch else 0.0,
        tokens_per_step=batch * train.mean_length,
        optimiser_steps_per_step=updates,
        forward_tokens_per_token=forward_tokens(shape, train.mean_length, traced) if rounds else 0.0,
        passes=passes,
    )


def _pieces(shape: Shape, documents: int) -> int:
    """In how many pieces the rollouts of so many documents are written or trained."""
    nsp = shape.nsp
    if nsp.rollout == "prefix":
        return 1
    return piece_count(documents * nsp.chunks, nsp.rollouts_per_position, nsp.rollouts_together)


def _passes_of_a_reading(shape: Shape, traced: bool) -> int:
    if traced and shape.reading == "whole":
        return 1
    return snapshot_count(shape.nsp.chunks, shape.longest or shape.length) + 1  # and the replay


def forward_tokens(shape: Shape, length: float, traced: bool) -> float | None:
    """Tokens put through the model per document token in one step, at most; docs/performance.md has the table.

    Args:
        shape: of the run.
        length: mean tokens of a document, T.
        traced: whether no token is replayed.
    """
    nsp, readings = shape.nsp, 1 if shape.activation_checkpointing == "none" else 2
    if not shape.with_rollouts:
        return float(readings)
    if nsp.rollout == "prefix":
        return None
    rollouts = nsp.chunks * nsp.rollouts_per_position
    replay = 0.0 if traced and shape.reading == "whole" else 1 / SNAPSHOTS_PER_CHUNK
    # pieces of rollouts are computed again, too
    again = readings if _pieces(shape, shape.update_rows) == 1 else 2
    trained = readings + again * rollouts * (nsp.longest_rollout - 1) / length
    read = 0.0 if shape.on_policy and traced and shape.activation_checkpointing == "none" else 1 + replay
    return read + rollouts * nsp.longest_rollout / length + trained


def disk_of(valid: ValidConfig, memory: MemoryEstimate, steps: int) -> Disk:
    """Checkpoints are float32 parameters and, where they are saved, AdamW's two moments of those that are trained.

    In `refine.ttt.keep` there is an adapter for every step: of a batch, or of a row with ``reset=sample``.
    """
    config, trainer, parameters, trained = valid.config, valid.config.trainer, memory.parameters, memory.trained
    ttt = valid.refine.ttt if valid.refine.phase == "ttt" else None
    contents = config.actor_rollout_ref.actor.checkpoint.save_contents
    numbers = parameters * ("model" in contents) + 2 * trained * ("optimizer" in contents)
    saves = -(-steps // int(trainer.save_freq)) if trainer.save_freq > 0 else 0
    kept = min(saves, int(trainer.max_actor_ckpt_to_keep or saves))
    place = existing(Path(trainer.default_local_dir))
    adapters: dict[str, Any] = {}
    if ttt is not None and ttt.keep is not None:
        there = existing(Path(ttt.keep))
        adapters = {"adapter": FP32 * trained, "adapters_kept": steps}
        if not same_file_system(there, place):
            adapters |= {"adapters_place": str(there), "adapters_free": shutil.disk_usage(there).free}
    final = FP32 * (trained if valid.lora.lora_rank else parameters)
    return Disk(
        place=str(place),
        checkpoint=FP32 * numbers,
        checkpoints_kept=kept,
        checkpoints_at_once=min(saves, kept + 1),
        final_model=0 if ttt is not None and ttt.reset != "none" else final,
        free=shutil.disk_usage(place).free,
        **adapters,
    )


def memory_here(device: str, workers_per_node: int) -> int | None:
    """Bytes one worker has on this machine; None for GPUs that are elsewhere."""
    import psutil
    import torch

    if device == "cpu":
        return int(psutil.virtual_memory().total) // workers_per_node
    return torch.cuda.get_device_properties(0).total_memory if accelerator_available() else None


def find_warnings(plan: Plan, valid: ValidConfig, model: Any) -> Iterator[str]:
    """What will surprise, in sentences with keys and cures."""
    batch, train = int(valid.config.data.train_batch_size), plan.train
    window = getattr(model, "max_position_embeddings", None)
    rest = train.sequences % batch
    if rest and valid.refine.phase != "ttt" and not train.estimated:
        others = "others each time, as the order is shuffled" if valid.config.data.shuffle else "always the last"
        yield (
            f"data.train_batch_size={batch} does not divide the {train.sequences:,} sequences: {rest:,} of them "
            f"are left out in every epoch ({others})."
        )
    if train.sequences < batch:
        yield f"{train.sequences:,} sequences do not fill a batch of data.train_batch_size={batch}; give more data."
    if window and train.longest > window:
        yield (
            f"sequences of up to {train.longest:,} tokens are longer than the {window:,} the model was made for "
            "(max_position_embeddings). A fast-weight model reads on, but was not trained that far: set "
            f"data.max_length={window} to stay within."
        )
    if plan.work.epochs > 4:
        yield f"the data is read {plan.work.epochs:.1f} times (trainer.total_training_steps={plan.work.steps})."
    if (rising := int(valid.config.actor_rollout_ref.actor.optim.lr_warmup_steps)) > plan.work.steps:
        yield (
            f"the learning rate warms up for {rising} steps (actor_rollout_ref.actor.optim.lr_warmup_steps), and the "
            f"run has {plan.work.steps}."
        )
    yield from _resource_warnings(plan, valid)
    if valid.refine.nsp.rollout == "prefix":
        yield "refine.nsp.rollout=prefix recomputes every prefix: it is for comparisons; its cost is not planned here."
    if valid.refine.phase != "documents":
        yield f"refine.phase={valid.refine.phase}: the steps on answers are not in the plan, only those on prompts."
    if train.estimated:
        yield "documents were sampled (sample=): what is said of them is an estimate."


def _resource_warnings(plan: Plan, valid: ValidConfig) -> Iterator[str]:
    available, memory, servers = plan.memory_available, plan.memory, plan.servers
    if servers is not None and servers.set_aside is not None and servers.set_aside < servers.weights + servers.states:
        yield (
            f"a vLLM server may take {size_text(servers.set_aside)} of a device ({servers.said_by}), and its weights "
            f"and the states of its sequences take {size_text(servers.weights + servers.states)}: raise that, or lower "
            "actor_rollout_ref.rollout.max_num_seqs."
        )
    if available is not None and memory.peak > 0.9 * available:
        cures = []
        if servers is not None and (memory.peak_phase == ANSWERS or not servers.sleeps):
            cures.append(f"lower {servers.said_by}")
        if plan.shape.activation_checkpointing == "none":
            cures.append("set model.activation_checkpointing=layer")
        elif plan.shape.reading == "whole" and plan.shape.with_rollouts:
            cures.append("set model.reading=segments")
        if plan.shape.update_rows > 1 or plan.shape.rollout_rows > 1:
            cures.append("lower actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu")
        nsp, shape = valid.refine.nsp, plan.shape
        rollouts = max(shape.update_rows, shape.rollouts_of) * nsp.chunks * nsp.rollouts_per_position
        forks = min(nsp.rollouts_together, rollouts) * (memory.state_bytes - memory.shared_bytes)
        if shape.with_rollouts and nsp.rollout == "fork" and forks > 0.1 * memory.peak:
            cures.append(f"lower refine.nsp.rollouts_together ({nsp.rollouts_together})")
        cures += ["use more workers", "lower data.max_length"]
        yield (
            f"{size_text(memory.peak)} are needed at the peak ({memory.peak_phase}), and a worker has "
            f"{size_text(available)}: {', or '.join(cures)}."
        )
    yield from _disk_warnings(plan)


def _disk_warnings(plan: Plan) -> Iterator[str]:
    disk, beside = plan.disk, plan.disk.adapters_place is None
    kept = f"{disk.adapters_kept} adapters of {size_text(disk.adapter, 2)} (refine.ttt.keep)"
    if disk.needed > disk.free:
        what, cures = [], []
        if disk.checkpoints_kept:
            size = size_text(disk.checkpoint, 2)
            what.append(f"{disk.checkpoints_kept} checkpoints of {size}, one more while it is written,")
            cures += ["raise trainer.save_freq", "set trainer.max_actor_ckpt_to_keep"]
        if disk.adapters and beside:
            what.append(kept)
            cures.append("set refine.ttt.keep to another disk")
        if disk.final_model:
            what.append(f"the final {'adapter' if plan.shape.lora.lora_rank else 'model'}")
        if disk.checkpoints_kept or disk.final_model:
            cures.append("set trainer.default_local_dir to another disk")
        verb = "needs" if len(what) == 1 and disk.final_model else "need"
        yield (
            f"{' and '.join(what)} {verb} {size_text(disk.needed)}, and {disk.place} has {size_text(disk.free)}: "
            f"{', or '.join(cures)}."
        )
    if disk.adapters_free is not None and disk.adapters > disk.adapters_free:
        yield (
            f"{kept} need {size_text(disk.adapters)}, and {disk.adapters_place} has {size_text(disk.adapters_free)}: "
            "set refine.ttt.keep to another disk."
        )
    if disk.checkpoints_kept == 0 and plan.work.steps > 1000 and not plan.shape.resets:
        yield f"no checkpoint is written in {plan.work.steps} steps (trainer.save_freq=-1)."
