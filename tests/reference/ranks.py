"""The real worker and trainer in plain processes, without Ray: one process per rank, each drives itself.

`python -m reference.ranks SPEC OUT`, with RANK, WORLD_SIZE and DIST_INIT_METHOD in the environment.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from reference.processes import Forked
from reference.runs import ROOT, TIMEOUT, environment
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

LENGTHS = (61, 40, 64, 23, 37, 64, 12, 50)
"""Of the documents of a batch; no two ranks have equally long ones."""
VALIDATION_LENGTHS = (30, 2, 17, 64, 9)


def columns(lengths: tuple[int, ...], seed: int, first_id: int = 0) -> dict[str, np.ndarray]:
    """A batch as verl's collate function leaves it."""
    rng = np.random.default_rng(seed)
    rows = np.empty(len(lengths), dtype=object)
    for b, length in enumerate(lengths):
        rows[b] = rng.integers(97, 123, length)
    return {"input_ids": rows, "document_id": np.arange(first_id, first_id + len(lengths), dtype=object)}


class Done:
    """A future that is there already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value


class LocalGroup:
    """A worker group in which every rank is its own driver: takes its share of a batch, gathers all results.

    Attributes:
        sent, received: bytes of each message without token ids, over all ranks together.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.world_size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        self.sent: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.last: dict[str, TensorDict] = {}

    def take_rollouts(self) -> list[dict[str, Tensor]]:
        """Asked of all ranks at once, without a batch."""
        shares: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(shares, self.worker.take_rollouts())
        rows = torch.cat([share["row"] for share in shares]).argsort()
        self.last["rollouts"] = {name: torch.cat([share[name] for share in shares])[rows] for name in shares[0]}
        return shares

    def __getattr__(self, name: str) -> Any:
        def call(data: TensorDict) -> Done:
            self.sent[name] = size_without_tokens(data)
            share = len(data) // self.world_size
            assert share * self.world_size == len(data)
            output = getattr(self.worker, name)(data[self.rank * share : (self.rank + 1) * share])
            shares: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(shares, output)
            # as verl collects: tensors are put together, of everything else rank 0's value stays
            result = shares[0] if not list(shares[0].keys()) or len(shares) == 1 else gathered(shares)
            self.received[name] = size_without_tokens(result)
            self.last[name] = result
            return Done(result)

        return call


def gathered(shares: list[TensorDict]) -> TensorDict:
    if not shares[0].batch_size or shares[0].batch_size[0] == 0:
        return shares[0]
    return torch.cat(shares)


def size_without_tokens(data: TensorDict) -> int:
    """Bytes of a message as it would be pickled for Ray, token ids of documents and rollouts left out."""
    rest = {name: value for name, value in data.items() if name not in ("tokens", "rollout_tokens")}
    return len(pickle.dumps(rest))


def make_config(spec: dict[str, Any], world: int) -> DictConfig:
    """The toy configuration, with an `initial_model/` as a real run writes it."""
    from refine_verl.compose.composition import compose_config, register_configs
    from refine_verl.compose.validate import validate
    from refine_verl.data.tokenizers import load_tokenizer
    from refine_verl.models import inspect_model

    register_configs()
    valid = validate(compose_config([*spec["overrides"], f"trainer.n_gpus_per_node={world}"]))
    info = inspect_model(None, valid.model.init_config)
    directory = Path(spec["directory"]) / f"initial_model_{world}_{os.environ['RANK']}"
    info.config.save_pretrained(directory)
    load_tokenizer("bytes").save_pretrained(str(directory))
    valid.config.actor_rollout_ref.model.path = str(directory)
    valid.config.actor_rollout_ref.model.tokenizer_path = str(directory)
    valid.config.actor_rollout_ref.actor.optim.total_training_steps = 10
    return valid.config


def full(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Unsharded copies."""
    whole = {}
    for name, value in tensors.items():
        assert value is not None, name
        whole[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return whole


class Session:
    """Trainer and worker of one rank."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from verl.utils.config import omega_conf_to_dataclass

        from refine_verl.trainer.refine_trainer import RefineTrainer
        from refine_verl.workers.loss import RefineLoss
        from refine_verl.workers.worker import NSPRolloutWorker

        config = make_config(spec, int(os.environ["WORLD_SIZE"]))
        self.trainer = RefineTrainer(config)
        self.trainer.global_steps, self.trainer.total_training_steps = 0, 10
        self.worker = NSPRolloutWorker(self.trainer._worker_config())
        self.worker.reset()
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        self.worker.set_loss_fn(RefineLoss(self.trainer.settings.loss, actor))
        self.group = LocalGroup(self.worker)
        self.trainer.actor_rollout_wg = self.group
        self.trainer.val_dataloader = [columns(VALIDATION_LENGTHS[:3], 8), columns(VALIDATION_LENGTHS[3:], 9)]
        self.initial = self.parameters()
        self.gradients: list[dict[str, Tensor]] = []
        self._record_gradients()

    def parameters(self) -> dict[str, Tensor]:
        return full({name: p for name, p in self.worker.engine.module.named_parameters()})

    def _record_gradients(self) -> None:
        """Keep every mini-batch's gradients, before they are clipped; verl drops them after the step."""
        engine = self.worker.engine
        step = engine.optimizer_step

        def recording() -> float:
            trained = ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)
            self.gradients.append(full({name: p.grad for name, p in trained}))
            return step()

        engine.optimizer_step = recording

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """One step of the trainer and what it left behind."""
        self.trainer.train_dataloader, self.trainer.train_dataloader_it = [batch], None
        self.trainer.global_steps += 1
        metrics: dict[str, float] = {}
        self.gradients.clear()
        self.trainer.step(metrics, {})
        written = self.group.last["rollouts" if self.trainer.settings.on_policy else "rollout_and_reward"]
        return {
            "metrics": metrics,
            "rollouts": {name: value.clone() for name, value in written.items()},
            "gradients": list(self.gradients),
            "parameters": self.parameters(),
        }

    def validate_by_hand(self) -> tuple[float, float]:
        """Loss and accuracy over all predicted tokens, from plain logits, document by document (one rank only)."""
        loss = correct = count = 0.0
        for batch in self.trainer.val_dataloader:
            for row in batch["input_ids"]:
                tokens = torch.from_numpy(row)
                with self.worker.engine.eval_mode(), torch.no_grad():
                    logits = self.worker.engine.module(input_ids=tokens[None]).logits[0, :-1].double()
                loss += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
                correct += (logits.argmax(-1) == tokens[1:]).sum().item()
                count += len(tokens) - 1
        return loss / count, correct / count

    def start_over(self) -> None:
        """Weights, optimiser and step as at the beginning."""
        state = self.worker.engine.module.state_dict()
        with torch.no_grad():
            for name, value in self.initial.items():
                target = state[name]
                if isinstance(target, DTensor):
                    value = distribute_tensor(value, target.device_mesh, target.placements)
                target.copy_(value)
        self.worker.engine.optimizer.state.clear()
        self.trainer.global_steps = 0

    def ways(self, batch: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """The same step in one mini-batch.

        With activation checkpointing, with the rollouts in the trained pass, and with three of them at a time.
        """
        module, settings, found = self.worker.engine.module, self.trainer.settings, {}
        mini_batch, checkpointing = settings.ppo_mini_batch_size, module.activation_checkpointing
        set_field(settings, "ppo_mini_batch_size", len(LENGTHS))
        for on_policy in (False, True):
            for kind in ("none", "layer", "segment"):
                self.start_over()
                module.activation_checkpointing = kind
                set_field(settings, "on_policy", on_policy)
                name = f"{'fused' if on_policy else 'two phases'}, {kind}"
                found[name] = self.step(batch)
                self.start_over()
                with_default = settings.nsp.rollouts_together
                set_field(settings.nsp, "rollouts_together", 3)
                found[f"{name}, in pieces"] = self.step(batch)
                set_field(settings.nsp, "rollouts_together", with_default)
        set_field(settings, "on_policy", False)
        set_field(settings, "ppo_mini_batch_size", mini_batch)
        module.activation_checkpointing = checkpointing
        self.start_over()
        return found

    def many(self, batch: dict[str, np.ndarray], **more: Any) -> dict[str, dict[str, Any]]:
        """A step of `midtrain_many_rollouts` in small: groups per position, credit per token, pieces; and ``more``."""
        from refine_verl.models.reward_manager import HiddenStateRewardManager

        settings, rewards, found = self.trainer.settings, self.worker.rewards, {}
        changed = {"group": "position", "credit": "token", "rollouts_together": 3, **more}
        before = {name: getattr(settings.nsp, name) for name in changed}
        for name, value in changed.items():
            set_field(settings.nsp, name, value)
        self.worker.rewards = HiddenStateRewardManager("hybrid", credit="token")
        for on_policy in (False, True):
            self.start_over()
            set_field(settings, "on_policy", on_policy)
            found["fused" if on_policy else "two phases"] = self.step(batch)
        self.worker.rewards = rewards
        for name, value in {**before, "on_policy": False}.items():
            set_field(settings if name == "on_policy" else settings.nsp, name, value)
        self.start_over()
        return found

    def measured(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The same step with the policy gradient measured before it, and the gradients of parts of the loss alone."""
        settings, found = self.trainer.settings, {}
        mini_batch, loss = settings.ppo_mini_batch_size, settings.loss
        set_field(settings, "ppo_mini_batch_size", len(LENGTHS))
        for name, value in (("gradient_snr_every", 1), ("gradient_cosine", True)):
            set_field(settings, name, value)
        for on_policy in (False, True):
            self.start_over()
            set_field(settings, "on_policy", on_policy)
            found["fused" if on_policy else "two phases"] = self.step(batch)
        for name, value in (("on_policy", False), ("gradient_snr_every", 0)):
            set_field(settings, name, value)
        parts = {"even": (1.0, 0.0, range(0, 8, 2)), "odd": (1.0, 0.0, range(1, 8, 2)), "next": (0.0, 1.0, range(8))}
        coefficients = loss.rl_coef, loss.sft_coef
        for part, (rl, sft, rows) in parts.items():
            self.start_over()
            for name, value in (("rl_coef", rl), ("sft_coef", sft)):
                set_field(loss, name, value)
            set_field(settings, "ppo_mini_batch_size", len(rows))
            found[part] = self.step({name: values[list(rows)] for name, values in batch.items()})["gradients"][0]
        for name, value in zip(("rl_coef", "sft_coef"), coefficients, strict=True):
            set_field(loss, name, value)
        set_field(settings, "ppo_mini_batch_size", mini_batch)
        self.start_over()
        return found

    def in_bf16(self, batch: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """The same step with matmuls in bf16, as on a GPU: with weights cast for all passes together, and apart."""
        from refine_verl.models import passes

        module, settings, found = self.worker.engine.module, self.trainer.settings, {}
        module.autocast_dtype, shared = torch.bfloat16, passes.shared_casts
        for on_policy in (False, True):
            set_field(settings, "on_policy", on_policy)
            for way, casts in (("together", shared), ("apart", lambda modules: contextlib.nullcontext())):
                passes.shared_casts = casts
                self.start_over()
                found[f"{'fused' if on_policy else 'two phases'}, {way}"] = self.step(batch)
        module.autocast_dtype, passes.shared_casts = None, shared
        set_field(settings, "on_policy", False)
        self.start_over()
        return found

    def looking(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Where rollouts begin with each strategy: positions [B, c]."""
        nsp, found = self.trainer.settings.nsp, {}
        for selection in ("surprise", "query", "entropy"):
            set_field(nsp, "selection", selection)
            found[selection] = self.group.rollout_and_reward(self.trainer._to_batch(batch)).get()["positions"]
        return found

    def shifted(self, old_log_probs: str) -> dict[str, float]:
        """The metrics of an update on rollouts whose log-probabilities are all 0.5 too high."""
        from refine_verl.workers.objective import Objective

        self.start_over()
        set_field(self.trainer.settings.loss, "old_log_probs", old_log_probs)
        set_field(self.trainer.settings, "ppo_mini_batch_size", 4)
        batch = self.trainer._to_batch(columns(LENGTHS, 1))
        rollouts = self.group.rollout_and_reward(batch).get()
        batch.update(rollouts.select("positions", "rollout_tokens", "old_log_probs"))
        batch["old_log_probs"] = batch["old_log_probs"] + 0.5
        advantages = rollouts["rewards"] - rollouts["rewards"].mean()
        batch["advantages"] = advantages[..., None].expand_as(batch["rollout_tokens"]).clone()
        metrics: dict[str, float] = {}
        self.trainer._update(batch, Objective.ROLLOUTS, metrics)
        return metrics

    def poisoned(self, value: float, rows: list[int]) -> dict[str, Any]:
        """Updates with a bad advantage in ``rows``, driven through the trainer's own accounting."""
        from verl.utils import tensordict_utils as tu

        from refine_verl.workers.objective import Objective

        batch = self.trainer._to_batch(columns(LENGTHS, 1))
        rollouts = self.group.rollout_and_reward(batch).get()
        batch.update(rollouts.select("positions", "rollout_tokens", "old_log_probs"))
        batch["advantages"] = torch.zeros(*rollouts["rollout_tokens"].shape)
        batch["advantages"][rows, 0, 0] = value
        before = self.parameters()
        metrics: dict[str, float] = {}
        self.trainer._update(batch, Objective.ROLLOUTS, metrics)
        updated = tu.get(self.group.last["update"], "metrics")
        return {
            "metrics": metrics,
            "grad_norms": list(updated["grad_norm"]),
            "before": before,
            "after": self.parameters(),
            "in_a_row": self.trainer.skipped_in_a_row,
        }


def set_field(settings: Any, name: str, value: Any) -> None:
    object.__setattr__(settings, name, value)


def scenarios(session: Session, world: int) -> dict[str, Any]:
    """Everything the tests look at."""
    batches = [columns(LENGTHS, 1), columns(LENGTHS[::-1], 2, first_id=100)]
    results: dict[str, Any] = {"initial": session.initial, "validation": session.trainer._validate()}
    if world == 1:
        results["validation_by_hand"] = session.validate_by_hand()
    results["steps"] = [session.step(batch) for batch in batches]
    results["validation_after"] = session.trainer._validate()
    if world == 1:
        results["validation_after_by_hand"] = session.validate_by_hand()
    results["ways"] = session.ways(batches[0])
    results["many"] = session.many(batches[0])
    from refine_verl.config import RolloutLength

    results["unequal"] = session.many(batches[0], rollout_length=RolloutLength(min=1, max=5, by="entropy"))
    results["measured"] = session.measured(batches[0])
    results["looking"] = session.looking(batches[0])
    results["in_bf16"] = session.in_bf16(batches[0])
    results["nan"], results["infinite"] = session.poisoned(math.nan, [0]), session.poisoned(math.inf, [0])
    results["all_bad"] = session.poisoned(math.nan, [3, 4])
    if world == 1:
        results.update(one_rank_only(session, batches))
    return results


def steps_only(session: Session, world: int) -> dict[str, Any]:
    """Two steps, and on one rank the negative control: for families beyond the first."""
    batches = [columns(LENGTHS, 1), columns(LENGTHS[::-1], 2, first_id=100)]
    results: dict[str, Any] = {"initial": session.initial, "steps": [session.step(batch) for batch in batches]}
    if world == 1:
        session.start_over()
        set_field(session.worker.engine_config, "micro_batch_size_per_gpu", 1)
        set_field(session.trainer.settings, "ppo_mini_batch_size", 2)
        half = {name: values[[0, 1, 4, 5]] for name, values in batches[0].items()}
        results["rank_0_alone"] = session.step(half)
    return results


def one_rank_only(session: Session, batches: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Other micro-batches, the negative control, and a batch of the paper's size."""
    results: dict[str, Any] = {}
    session.start_over()
    for settings, name, value in (
        (session.worker.engine_config, "micro_batch_size_per_gpu", 4),
        (session.worker.settings, "rollout_micro_batch_size", 3),
    ):
        set_field(settings, name, value)
    results["other_micro_batches"] = [session.step(batch) for batch in batches]
    session.start_over()
    set_field(session.worker.engine_config, "micro_batch_size_per_gpu", 1)
    set_field(session.trainer.settings, "ppo_mini_batch_size", 2)
    half = {name: values[[0, 1, 4, 5]] for name, values in batches[0].items()}
    results["rank_0_alone"] = session.step(half)
    session.start_over()
    results["old_log_probs"] = {kind: session.shifted(kind) for kind in ("rollout", "recomputed")}
    set_field(session.trainer.settings.loss, "old_log_probs", "rollout")
    session.start_over()
    for name, value in (("chunks", 8), ("rollout_length", 5), ("rollouts_per_position", 1)):
        set_field(session.trainer.settings.nsp, name, value)
    assert session.worker.engine.nsp.chunks == 8
    set_field(session.worker.settings, "rollout_micro_batch_size", 32)
    set_field(session.trainer.settings, "ppo_mini_batch_size", 32)
    set_field(session.worker.engine_config, "micro_batch_size_per_gpu", 8)
    session.step(columns((64,) * 128, 5))
    results["message_bytes"] = {"sent": session.group.sent, "received": session.group.received}
    return results


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    session = Session(spec)
    results = {"all": scenarios, "steps": steps_only}[spec["what"]](session, int(os.environ["WORLD_SIZE"]))
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[2])
    torch.distributed.destroy_process_group()


def run_ranks(
    world: int, directory: Path, overrides: list[str], what: str = "all", module: str = "reference.ranks"
) -> dict[str, Any]:
    """Start `world` processes and return what rank 0 saved: of `scenarios` ("all") or of `steps_only` ("steps")."""
    directory.mkdir(parents=True, exist_ok=True)
    spec, out = directory / "spec.json", directory / "out.pt"
    spec.write_text(json.dumps({"overrides": overrides, "directory": str(directory), "what": what}))
    shared = {
        **environment(),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DIST_INIT_METHOD": f"file://{directory / 'rendezvous'}",
    }
    processes = [
        Forked(
            module,
            [str(spec), str(out)],
            env={**shared, "RANK": str(rank)},
            cwd=ROOT,
            output=directory / f"rank_{rank}.log",
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() not in (None, 0) for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    logs = "\n".join((directory / f"rank_{rank}.log").read_text()[-3000:] for rank in range(world))
    ended = [process.returncode for process in processes]
    assert not any(ended), f"exit codes {ended} (-9: killed, after {TIMEOUT} s or because another rank failed)\n{logs}"
    return {**torch.load(out, weights_only=False), "log": logs}


if __name__ == "__main__":
    main()
