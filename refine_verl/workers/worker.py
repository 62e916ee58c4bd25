"""One training process: the sharded actor, its rollouts, their rewards and its updates."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name, get_torch_device
from verl.utils.import_utils import import_external_libs
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from refine_verl.config import ModelSettings, RefineSettings
from refine_verl.models import RolloutBatch
from refine_verl.models.answers import Answers, answer_draws
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.plugin import PluginError, check_plugin
from refine_verl.record.checkpoint_files import FileRecord, flushed
from refine_verl.record.disk_space import could_not_write
from refine_verl.workers.advantage import compute_advantages
from refine_verl.workers.engine import RefineEngine, documents_of
from refine_verl.workers.failures import lost_connection
from refine_verl.workers.gradient_signal import measure_gradients
from refine_verl.workers.objective import Objective, on_device, tokens_to_learn
from refine_verl.workers.rendezvous import join_process_group
from refine_verl.workers.snapshot import Snapshot, shard_bytes


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs beyond verl's own sections; travels in ``TrainingWorkerConfig.extra_context``.

    Attributes:
        refine: the ``refine:`` section.
        model: the ``model:`` section.
        seed: of all sampling and of random initial weights.
        max_length: no document of the run is longer (tokens).
        rollout_micro_batch_size: documents per rollout or validation pass.
        threads: CPU threads of this process where there is no GPU.
        algorithm: verl's ``algorithm`` section, by which rollouts are compared.
        stop_tokens: ids that end a generated answer.
    """

    refine: RefineSettings
    model: ModelSettings
    seed: int
    max_length: int
    rollout_micro_batch_size: int
    threads: int
    algorithm: dict[str, Any]
    stop_tokens: tuple[int, ...] = ()


class NSPRolloutWorker(TrainingWorker):
    """verl's training worker plus rollouts and rewards next to the model.

    Hidden states, logits and model states never leave it: :meth:`rollout_and_reward` and :meth:`take_rollouts` return
    token ids and a few numbers per rollout, less than 1 MB a step besides the ids for 128 documents.
    """

    engine: RefineEngine

    def __init__(self, config: TrainingWorkerConfig) -> None:
        # the driver's model config arrives pickled, its imports do not
        import_external_libs(config.model_config.external_lib)
        check_plugin()
        self.settings: WorkerSettings = config.extra_context["worker"]
        if get_device_name() == "cpu":
            torch.set_num_threads(self.settings.threads)
        join_process_group()
        super().__init__(config)
        if type(self.engine) is not RefineEngine:
            raise PluginError(f"verl built a {type(self.engine).__name__}: another plug-in owns '{config.model_type}'")
        self.engine.configure(self.settings.refine.nsp, self.settings.model, self.settings.seed)
        nsp = self.settings.refine.nsp
        self.rewards = HiddenStateRewardManager(nsp.reward, credit=nsp.credit)
        self.engine.on_policy_pass = self._on_policy_pass
        self.written: list[dict[str, Tensor]] = []
        self.reward_seconds = 0.0

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def rollout_and_reward(self, data: TensorDict) -> TensorDict:
        """Steps 1 to 3 of the paper for this rank's documents.

        Args:
            data: ``tokens`` [b, Tmax], ``lengths`` [b], ``document_id`` [b], all int64; non-tensor ``global_step``.

        Returns:
            On the CPU: ``positions`` [b, c], ``rollout_tokens`` [b, c, n, k], ``old_log_probs`` [b, c, n, k],
            ``rewards``, ``reward_cosine``, ``reward_binary`` [b, c, n], with ``credit=token`` ``token_rewards``
            [b, c, n, k], where they differ ``rollout_lengths`` [b, c], ``entropy_mean`` [b], ``entropy_selected``
            [b, c], of a model with experts ``routes`` [b, c, n, k - 1]; ``forward_tokens`` and ``reward_seconds`` [b],
            this rank's in its first row.
        """
        counted = self.engine.module.forward_tokens
        self.reward_seconds = 0.0
        step = self._step()
        documents, ids = documents_of(on_device(data, get_device_id())), data["document_id"].tolist()
        with self.engine.eval_mode(), self.engine.gathered():
            rollouts = step.write_and_reward(tu.get(data, "global_step"), documents, ids, self._reward)
        output = {
            name: (values.float() if values.is_floating_point() else values).cpu() for name, values in rollouts.items()
        }
        output["forward_tokens"] = _in_first_row(self.engine.module.forward_tokens - counted, len(data))
        output["reward_seconds"] = _in_first_row(self.reward_seconds, len(data))
        return tu.get_tensordict(tensor_dict=output)

    def _step(self) -> Step:
        settings = self.settings
        return Step(
            self.engine.module,
            settings.refine.nsp,
            settings.seed,
            read_together=settings.rollout_micro_batch_size,
            longest=settings.max_length,
        )

    def _on_policy_pass(self, micro_batch: TensorDict) -> dict[str, Tensor]:
        """Steps 1 to 3 inside the trained pass of a micro-batch, which gets ``advantages`` and ``old_log_probs``."""
        step = int(tu.get(micro_batch, "global_step"))
        ids = micro_batch["document_id"].tolist()
        numbers, output = self._step().on_policy(step, documents_of(micro_batch), ids, self._reward)
        algorithm = OmegaConf.create(self.settings.algorithm)
        advantages = compute_advantages(numbers, self.settings.refine.nsp, algorithm)
        known = ("old_log_probs", "written_log_probs", "rollout_lengths", "routes")
        micro_batch.update({name: numbers[name] for name in known if name in numbers})
        micro_batch["advantages"] = advantages
        self.written.append({"row": micro_batch["row"], "advantages": advantages, **numbers})
        return output

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_rollouts(self) -> dict[str, Tensor]:
        """What this rank wrote in its on-policy updates since it was asked last.

        On the CPU, one row per document: what `rollout_and_reward` returns of the rollouts, ``advantages``
        [b, c, n, k], ``row`` [b] and ``reward_seconds`` [b], this rank's in its first row.
        """
        parts, self.written = self.written, []
        taken = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        taken = {name: values.float() if values.is_floating_point() else values for name, values in taken.items()}
        taken["reward_seconds"] = _in_first_row(self.reward_seconds, len(taken["row"]))
        self.reward_seconds = 0.0
        return taken

    def _reward(self, rollouts: RolloutBatch) -> dict[str, Tensor]:
        get_torch_device().synchronize()  # or the reward would be charged for what the device has still to do
        started = time.perf_counter()
        rewards = self.rewards(rollouts)
        self.reward_seconds += time.perf_counter() - started
        return rewards

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def update(self, data: TensorDict) -> TensorDict:
        """Step 4: one optimiser step per mini-batch. Adds ``forward_tokens`` (all ranks) to verl's metrics.

        With ``measure_gradients``, those of `measure_gradients` of the first mini-batch, before it is trained on.

        Args:
            data: what its `Objective`, the non-tensor ``objective``, asks for; with ``hold_learning_rate`` the
                schedule does not move.
        """
        counted = self.engine.module.forward_tokens
        self.engine.hold_learning_rate = bool(tu.pop(data, "hold_learning_rate", False))
        # verl only sums this to count what a mini-batch learns from: no mask of T flags is needed
        data["loss_mask"] = tokens_to_learn(data)
        objective = Objective.of(data)
        recomputed = self.settings.refine.loss.old_log_probs == "recomputed" and objective is not Objective.ON_POLICY
        by_server = objective is Objective.ANSWERS and self.settings.refine.answers.engine == "vllm"
        if (recomputed and objective.reinforces) or by_server:
            data["written_log_probs"] = data["old_log_probs"]
            data["old_log_probs"] = self._log_probs_before(data)
        measured = self._measured(data) if tu.pop(data, "measure_gradients", False) else {}
        if by_server:
            measured |= self._gap_to_server(data)
        output = self.train_mini_batch(data)
        tu.get(output, "metrics").update({name: [value] for name, value in measured.items()})
        tokens = torch.tensor(self.engine.module.forward_tokens - counted, device=get_device_id())
        torch.distributed.all_reduce(tokens, group=self.engine.get_data_parallel_group())
        tu.get(output, "metrics")["forward_tokens"] = [tokens.item()]
        return output

    def _gap_to_server(self, data: TensorDict) -> dict[str, float]:
        """Mean and largest |difference| of log-probabilities between vLLM and this model, over all ranks' answers."""
        places = torch.arange(data["answer_tokens"].shape[-1])
        counted = (places < data["answer_lengths"][..., None]) & (data["weight"] > 0)[:, None, None]
        gaps = (data["old_log_probs"] - data["written_log_probs"]).abs()[counted].double()
        sums = torch.tensor([gaps.sum(), len(gaps)], dtype=torch.float64, device=get_device_id())
        largest = gaps.max() if len(gaps) else torch.zeros(())
        most = torch.tensor([largest], dtype=torch.float64, device=get_device_id())
        group = self.engine.get_data_parallel_group()
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
        total, tokens = sums.tolist()
        return {"answers/log_prob_gap/mean": total / max(tokens, 1), "answers/log_prob_gap/max": most.item()}

    def _measured(self, data: TensorDict) -> dict[str, float]:
        """Of this rank's first mini-batch. The rollouts that it writes in the trained pass are not the update's."""
        first = data[: int(tu.get(data, "mini_batch_size")) // self.engine.get_data_parallel_size()]
        tu.assign_non_tensor(first, micro_batch_size_per_gpu=self.engine_config.micro_batch_size_per_gpu)
        written = len(self.written)
        measured = measure_gradients(self.engine, self.loss_fn, first, self.settings.refine.gradient_cosine)
        del self.written[written:]
        return measured

    def _log_probs_before(self, data: TensorDict) -> Tensor:
        """Log-probabilities under the weights as they are, from the micro-batches and the pass that are trained."""
        size = tu.get(data, "micro_batch_size_per_gpu", self.engine_config.micro_batch_size_per_gpu)
        with self.engine.train_mode(), torch.no_grad():
            there = (on_device(part, get_device_id()) for part in data.split(size))
            parts = [self.engine.trained_pass(part)["log_probs"] for part in there]
        return torch.cat(parts).float().cpu().view(data["old_log_probs"].shape)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def score(self, data: TensorDict) -> TensorDict:
        """Next-token loss (sum) and number of right argmaxes of each document: ``loss`` [b], ``correct`` [b]."""
        documents = documents_of(on_device(data, get_device_id()))
        with self.engine.eval_mode(), self.engine.gathered():
            parts = documents.split(self.settings.rollout_micro_batch_size)
            scores = [self.engine.module(mode="score", documents=part) for part in parts]
        loss, correct = (torch.cat(values).cpu() for values in zip(*scores, strict=True))
        return tu.get_tensordict(tensor_dict={"loss": loss.double(), "correct": correct})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def answer(self, data: TensorDict) -> TensorDict:
        """Answer prompts, each read once whatever number of answers it gets.

        Args:
            data: ``tokens`` [b, Tmax], ``lengths``, ``document_id``, ``max_new_tokens`` [b]; non-tensor ``samples`` n,
                ``answer_width`` A (most tokens of any answer, on all ranks), ``temperature`` (0: greedy) and
                ``global_step``.

        Returns:
            On the CPU: ``answer_tokens`` [b, n, A], ``answer_lengths`` [b, n], ``old_log_probs`` [b, n, A] (see
            `Answers`); ``forward_tokens`` [b], this rank's in its first row.
        """
        counted = self.engine.module.forward_tokens
        with self.engine.eval_mode(), self.engine.gathered():
            parts = [self._answer_micro_batch(part) for part in data.split(self.settings.rollout_micro_batch_size)]
        output = {
            "answer_tokens": torch.cat([part.tokens for part in parts]).cpu(),
            "answer_lengths": torch.cat([part.lengths for part in parts]).cpu(),
            "old_log_probs": torch.cat([part.log_probs for part in parts]).float().cpu(),
            "forward_tokens": _in_first_row(self.engine.module.forward_tokens - counted, len(data)),
        }
        return tu.get_tensordict(tensor_dict=output)

    def _answer_micro_batch(self, data: TensorDict) -> Answers:
        samples, width, temperature, step = (
            tu.get(data, name) for name in ("samples", "answer_width", "temperature", "global_step")
        )
        ids = data["document_id"].tolist()
        draws = answer_draws(self.settings.seed, step, ids, samples, width) if temperature > 0 else None
        answers: Answers = self.engine.module(
            mode="generate",
            prompts=documents_of(on_device(data, get_device_id())),
            limits=data["max_new_tokens"].tolist(),
            length=width,
            copies=samples,
            temperature=temperature,
            draws=draws,
            stop_tokens=self.settings.stop_tokens,
            all_done=self.engine.all_done,
        )
        return answers

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def connect_servers(self, rollout: Any, servers: list[Any]) -> None:
        """Make this rank the sender of weights to the vLLM server beside it.

        Args:
            rollout: verl's rollout section that the servers were started with.
            servers: the first server of each replica.
        """
        from refine_verl.workers.weight_link import WeightLink

        self.link = WeightLink(rollout, self.model_config, servers)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def update_weights(self, global_steps: int, mode: str = "naive") -> None:
        """Send the weights as they are to the server beside this rank; verl's `CheckpointEngineManager` calls it.

        Args:
            global_steps: verl's name for the version of the weights; every answer says with which it was written.
            mode: of verl: servers share the devices of the workers (``naive``).

        Raises:
            ServerGone: the server has ended or refused them.
        """
        sleeps = self.link.rollout.free_cache_engine
        get_torch_device().empty_cache()
        if sleeps:
            self.link.wake(["weights"])
        weights, _ = self.engine.get_per_tensor_param()
        self.link.send(iter(weights), global_steps)
        del weights
        get_torch_device().synchronize()
        get_torch_device().empty_cache()
        if sleeps:
            torch.distributed.barrier()  # no server takes its memory before all ranks have freed theirs
            self.link.wake(["kv_cache"])

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def snapshot(self) -> None:
        """Remember weights, optimiser, schedule and random state as they are now; see :meth:`restore`."""
        self.saved = Snapshot(self.engine)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def restore(self) -> None:
        """Return to the last :meth:`snapshot`, bit for bit."""
        self.saved.restore(self.engine)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> dict[str, FileRecord]:
        """verl's checkpoint of this rank; what it wrote is on disk when this returns.

        Args:
            local_path: directory to write into.
            hdfs_path, global_step, max_ckpt_to_keep: as in verl.

        Returns:
            Every file this rank wrote, by its path in ``local_path``.

        Raises:
            CheckpointError: the disk refuses; a DiskFullError if it is full.
        """
        with self._writing(local_path):
            self.engine.save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
            return self._written(Path(local_path))

    def _written(self, folder: Path) -> dict[str, FileRecord]:
        """Shards belong to the rank in their name, everything else to rank 0."""
        files = {}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            shard = re.search(r"_rank_(\d+)\.pt$", file.name)
            if int(shard[1] if shard else 0) == self.engine.rank:
                files[file.relative_to(folder).as_posix()] = flushed(file)
        return files

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export(self, directory: str) -> None:
        """Write a Hugging Face model directory that ``AutoModelForCausalLM`` loads, tokenizer included.

        Raises:
            CheckpointError: the disk refuses; a DiskFullError if it is full.
        """
        with self._writing(directory):
            self.engine.export(directory, self.model_config.get_processor())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_adapter(self, directory: str, about: dict[str, Any] | None = None) -> None:
        """Write the adapters as a directory that ``PeftModel.from_pretrained`` loads.

        Args:
            directory: replaced if it is there.
            about: what they were trained on, for `refine_adapter.json`.

        Raises:
            CheckpointError: the disk refuses; a DiskFullError if it is full.
        """
        with self._writing(directory):
            self.engine.save_adapter(directory, about)

    @contextmanager
    def _writing(self, directory: str) -> Iterator[None]:
        try:
            yield
        # torch reports a full disk as a RuntimeError without a number, safetensors as an exception of its own
        except Exception as error:
            if lost_connection(error):
                raise
            writer = f"rank {self.engine.rank} on {socket.gethostname()}: "
            raise could_not_write(error, Path(directory), shard_bytes(self.engine), writer) from error


def _in_first_row(value: float, rows: int) -> Tensor:
    """A number of this rank as a tensor [rows] that sums to it: what leaves a worker has a row per document."""
    tensor = torch.zeros(rows, dtype=torch.int64 if isinstance(value, int) else torch.float32)
    tensor[0] = value
    return tensor


def worker_threads(workers_per_node: int) -> int:
    """CPU threads for each of several workers on one node: OMP_NUM_THREADS, or an equal share of the cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else max(1, (os.cpu_count() or 1) // workers_per_node)
