"""The workers and trainers of post-training and test-time training in plain processes; see `reference.ranks`."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from reference.prompt_runs import make_rows
from reference.ranks import LocalGroup, full, make_config
from torch import Tensor


class Group(LocalGroup):
    """Also the calls that carry no batch."""

    def snapshot(self) -> None:
        self.worker.snapshot()

    def restore(self) -> None:
        self.worker.restore()

    def save_adapter(self, directory: str, about: dict[str, Any]) -> None:
        self.worker.save_adapter(directory, about)


class Rows:
    """A test set as verl's dataset class hands it out."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def tokenised(count: int, seed: int) -> list[dict[str, Any]]:
    """Bytes as tokens, as the tokenizer `bytes` makes them."""
    return [
        {
            "prompt_ids": np.frombuffer(row["prompt"].encode(), dtype=np.uint8).astype(np.int64),
            "answer_ids": np.array([*row["answer"][0].encode(), 256]),
            "answers": row["answer"],
            "classes": [],
            "task": row["task"],
            "id": row["name"],
            "max_new_tokens": row["max_gen_tokens"],
            "document_id": 1000 * seed + (7 * index) % count,
        }
        for index, row in enumerate(make_rows(count, seed))
    ]


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def odd_score(columns: Any, row: int, text: str) -> dict[str, float]:
    """A score that differs between the answers to one prompt, also for a model that knows nothing."""
    return {"odd": float(sum(map(ord, text)) % 3)}


class Session:
    """Trainer and worker of one rank, for the settings in ``overrides``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from verl.utils.config import omega_conf_to_dataclass

        from refine_verl.trainer.launch import TRAINERS
        from refine_verl.workers.loss import RefineLoss
        from refine_verl.workers.worker import NSPRolloutWorker

        self.world = int(os.environ["WORLD_SIZE"])
        config = make_config(spec, self.world)
        config.trainer.default_local_dir = str(Path(spec["directory"]) / f"run_{os.environ['RANK']}")
        Path(config.trainer.default_local_dir).mkdir(exist_ok=True)
        self.trainer: Any = TRAINERS[config.refine.phase](config)
        self.trainer._init_tokenizer()
        self.trainer.global_steps, self.trainer.total_training_steps = 0, 10
        self.worker = NSPRolloutWorker(self.trainer._worker_config())
        self.worker.reset()
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        self.worker.set_loss_fn(RefineLoss(self.trainer.settings.loss, actor))
        self.group = self.trainer.actor_rollout_wg = Group(self.worker)
        self.gradients: list[dict[str, Tensor]] = []
        step = self.worker.engine.optimizer_step

        def recording() -> float:
            named = self.worker.engine.module.named_parameters()
            self.gradients.append(full({name: p.grad for name, p in named if p.requires_grad}))
            return step()

        self.worker.engine.optimizer_step = recording
        self.trainer._start_profile_schedule()
        self.worker.snapshot()
        self.beginning = self.worker.saved

    def configure(self, **changes: Any) -> None:
        """Other settings for what follows; weights and optimiser as at the beginning."""
        for name, value in changes.items():
            owner = self.trainer.settings.ttt if name in ("reset", "steps") else self.trainer.settings
            object.__setattr__(owner, name, value)
        self.beginning.restore(self.worker.engine)
        self.trainer.global_steps = 0

    def state(self) -> dict[str, Any]:
        """All that test-time training must return, this rank's part."""
        from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

        engine = self.worker.engine
        named = engine.module.state_dict()
        tensors = {name: (p.to_local() if hasattr(p, "to_local") else p).clone() for name, p in named.items()}
        return {
            "tensors": tensors,
            "optimizer": copy.deepcopy(engine.optimizer.state_dict()),
            "schedule": copy.deepcopy(engine.lr_scheduler.state_dict()),
            "random": BaseCheckpointManager.get_rng_state(),
        }

    def step(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One step of post-training."""
        self.trainer.train_dataloader, self.trainer.train_dataloader_it = [columns(rows)], None
        self.trainer.global_steps += 1
        self.gradients.clear()
        metrics: dict[str, float] = {}
        self.trainer.step(metrics, {})
        named = self.worker.engine.module.named_parameters()
        return {"metrics": metrics, "gradients": list(self.gradients), "parameters": full(dict(named))}

    def test_time(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All batches of test-time training, without files and displays."""
        self.trainer.val_dataset = Rows(rows)
        self.worker.snapshot()
        answered: list[dict[str, Any]] = []
        self.trainer.rows_of = self.trainer.batches()
        for step, _ in enumerate(self.trainer.rows_of, start=1):
            self.trainer.global_steps = step
            self.trainer.step({}, {})
            answered += self.trainer.answers
        return answered


def posttrain(session: Session) -> dict[str, Any]:
    rows, other = tokenised(8, 1), tokenised(8, 1)
    for row in other:
        row["answer_ids"] = np.array([122, 121, 120, 119, 256])
        row["answers"] = ["zyxw"]
    results: dict[str, Any] = {}
    for inner in ("refine", "sft", "none"):
        session.configure(inner=inner, outer="sft")
        results[inner] = session.step(rows)
        results[f"{inner}_twice"] = session.step(tokenised(8, 3))
        results[f"{inner}_schedule"] = session.worker.engine.lr_scheduler.state_dict()["last_epoch"]
        session.configure()
        results[f"{inner}_other_answers"] = session.step(other)
    session.trainer.scores = odd_score
    session.configure(inner="refine", outer="grpo")
    results["grpo"] = session.step(rows)
    results["sampled"] = {name: value.clone() for name, value in session.group.last["answer"].items()}
    session.configure(inner="none")
    results["grpo_alone"] = session.step(rows)
    session.configure(inner="none")
    with served(session):
        results["served"] = session.step(rows)
    session.configure(inner="none")
    session.trainer.val_dataloader = [columns(rows[:3]), columns(rows[3:5])]
    results["validation"] = [row for batch in session.trainer.val_dataloader for row in session.trainer.answered(batch)]
    return results


GAP, LARGEST_GAP = 0.125, 0.5


@contextmanager
def served(session: Session) -> Any:
    """The worker's answers with the log-probabilities that a server with other rounding might have given them."""
    trainer = session.trainer
    own = trainer.answer

    def answer(*args: Any, **kwargs: Any) -> Any:
        servers, trainer.servers = trainer.servers, None
        answers, tokens = own(*args, **kwargs)
        trainer.servers = servers
        answers = answers.clone()
        written = torch.arange(answers["answer_tokens"].shape[-1]) < answers["answer_lengths"][..., None]
        answers["old_log_probs"] = answers["old_log_probs"] - GAP * written
        answers["old_log_probs"][0, 0, 0] -= LARGEST_GAP - GAP
        return answers, tokens

    answering = trainer.settings.answers
    trainer.answer, trainer.servers = answer, SimpleNamespace(in_use=nullcontext)
    object.__setattr__(answering, "engine", "vllm")
    try:
        yield
    finally:
        object.__setattr__(answering, "engine", "own")
        trainer.answer, trainer.servers = own, None


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through all containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@contextmanager
def failing(session: Session, after: int) -> Any:
    """Generation fails, after so many calls that do not."""
    real, calls = session.trainer.answer, iter(range(100))

    def answer(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            torch.rand(3)  # random state and gradients are not those of the beginning either
            random.random()
            raise RuntimeError("generation failed")
        return real(*args, **kwargs)

    session.trainer.answer = answer
    try:
        yield
    finally:
        session.trainer.answer = real


TTT_RUNS = (("refine", "batch"), ("refine", "sample"), ("refine", "none"), ("sft", "batch"))


def ttt(session: Session) -> dict[str, Any]:
    rows = tokenised(5, 2)
    results: dict[str, Any] = {"restored": {}}
    for inner, reset in TTT_RUNS:
        name = f"{inner}_{reset}"
        session.configure(inner=inner, reset=reset, steps=2)
        before = session.state()
        results[name] = session.test_time(rows)
        results["restored"][name] = same(before, session.state())
        session.configure()
        results[f"{name}_shuffled"] = session.test_time([rows[i] for i in (3, 0, 4, 2, 1)])
    results["restored_after_failure"] = []
    session.configure(inner="refine", reset="batch")
    for _ in range(2):  # without and with an optimiser state
        before = session.state()
        with failing(session, after=1):
            try:
                session.test_time(rows)
            except RuntimeError as error:
                results["failure"] = str(error)
        results["restored_after_failure"].append(same(before, session.state()))
        session.trainer.settings.ttt.__dict__["reset"] = "none"
        session.test_time(rows[:2])
        session.trainer.settings.ttt.__dict__["reset"] = "batch"
        results["has_state"] = bool(session.worker.engine.optimizer.state)
    session.configure(inner="refine", reset="sample", steps=1)
    session.gradients.clear()
    session.test_time(rows[:1])
    results["one_prompt"] = list(session.gradients)
    return results


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    session = Session(spec)
    results = {"posttrain": posttrain, "ttt": ttt}[session.trainer.settings.phase](session)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[2])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
